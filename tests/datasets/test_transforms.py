"""Presets of image transforms."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.models import ResNet50_Weights
from torchvision.transforms import v2

from etude.datasets import eval_transform, train_transform
from etude.datasets.normalization import IMAGENET_MEAN, IMAGENET_STD, channel_statistics

NEUTRAL = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def picture(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> Tensor:
    return v2.functional.pil_to_tensor(image) / 255


class TestEvaluation:
    @pytest.mark.parametrize(
        ("weights", "resize_size"), [(ResNet50_Weights.IMAGENET1K_V1, None), (ResNet50_Weights.IMAGENET1K_V2, 232)]
    )
    def test_it_is_what_torchvisions_weights_expect(self, weights: ResNet50_Weights, resize_size: int | None) -> None:
        image = picture(400, 300)
        own = eval_transform(224, IMAGENET_MEAN, IMAGENET_STD, resize_size=resize_size)
        assert torch.allclose(own(image), weights.transforms()(image), atol=1e-6)

    def test_images_are_normalised(self) -> None:
        plain, normalised = eval_transform(32, *NEUTRAL), eval_transform(32, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
        assert torch.allclose(normalised(picture()), (plain(picture()) - mean) / std)


class TestTraining:
    @pytest.mark.parametrize("augmentation", ["none", "crop_flip", "reference"])
    @pytest.mark.parametrize("size", [(60, 40), (9, 100), (32, 32)])
    def test_every_image_becomes_a_tensor_of_the_size(self, augmentation: str, size: tuple[int, int]) -> None:
        transform = train_transform(augmentation, 32, IMAGENET_MEAN, IMAGENET_STD)  # type: ignore[arg-type]
        for _ in range(10):
            image = transform(picture(*size))
            assert (image.shape, image.dtype) == ((3, 32, 32), torch.float32)

    def test_none_is_the_transform_of_evaluation(self) -> None:
        whole = train_transform("none", 32, *NEUTRAL)(picture())
        assert torch.equal(whole, eval_transform(32, *NEUTRAL)(picture()))

    def test_crop_and_flip_moves_the_image_by_up_to_four_pixels(self) -> None:
        image = picture(32, 32)
        padded = torch.nn.functional.pad(pixels(image), (4, 4, 4, 4))
        crops = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        known = [*crops, *(crop.flip(-1) for crop in crops)]
        transform = train_transform("crop_flip", 32, *NEUTRAL)
        images = [transform(image) for _ in range(60)]
        seen = {next(number for number, crop in enumerate(known) if torch.allclose(crop, own)) for own in images}
        assert len(seen) > 30
        assert min(seen) < 81 <= max(seen)

    def test_the_reference_crops_resizes_augments_and_erases(self) -> None:
        transform = train_transform("reference", 32, *NEUTRAL)
        kinds = [type(step) for step in transform.transforms]  # type: ignore[attr-defined]  # of a Compose
        assert kinds[:3] == [v2.RandomResizedCrop, v2.RandomHorizontalFlip, v2.TrivialAugmentWide]
        assert kinds[-1] is v2.RandomErasing
        images = [transform(picture()) for _ in range(100)]
        assert 1 <= sum(bool((image == 0).all(0).float().mean() > 0.02) for image in images) < 60

    def test_it_draws_from_the_global_generators_only(self) -> None:
        """So that a resume and any number of workers give the same images."""

        def draw() -> Tensor:
            torch.manual_seed(1)
            random.seed(1)
            return torch.stack([train_transform("reference", 32, *NEUTRAL)(picture()) for _ in range(5)])

        assert torch.equal(draw(), draw())


def test_statistics_are_those_of_all_pixels() -> None:
    images = [torch.randint(0, 256, (count, 3, 5, 6), dtype=torch.uint8) for count in (2, 1, 4)]
    mean, std = channel_statistics([*images, images[0][0]])
    whole = torch.cat([*images, images[0][:1]]).double() / 255
    assert mean == pytest.approx(whole.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(whole.std((0, 2, 3), correction=0).tolist())
