"""Random images that cost nothing to load, to measure the speed of training."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..engine.checks import check_int
from .image_dataloaders import ImageDataloaders, LoaderSettings
from .transforms import check_image_size

_NUM_DIFFERENT = 64


def synthetic_dataloaders(
    batch_size: int = 32,
    image_size: int = 224,
    num_workers: int = 0,
    *,
    num_classes: int = 1000,
    num_train: int = 10_000,
    num_eval: int = 1_000,
    seed: int = 0,
    pin_memory: bool | None = None,
    persistent_workers: bool | None = None,
) -> ImageDataloaders:
    """Batches of normally distributed images with random classes: there is nothing to learn.

    There are 64 different images, which repeat.

    Args:
        batch_size: Images per batch, at least 1. An incomplete last training batch is dropped.
        image_size: Height and width of an image in pixels, at least 8.
        num_workers: Processes that load images, at least 0.
        num_classes: At least 2.
        num_train: Training images per epoch, at least 1.
        num_eval: Evaluation images, at least 1.
        seed: Of images and classes.
        pin_memory: By default, whether there is a GPU.
        persistent_workers: By default, whether there are workers.

    Raises:
        ValueError: If an argument is invalid.
    """
    loaders = LoaderSettings(
        batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory, persistent_workers=persistent_workers
    )
    check_image_size(image_size)
    for name, value, least in (("num_classes", num_classes, 2), ("num_train", num_train, 1), ("num_eval", num_eval, 1)):
        check_int(name, value, ge=least)
    generator = torch.Generator().manual_seed(check_int("seed", seed, ge=0))
    images = torch.randn(_NUM_DIFFERENT, 3, image_size, image_size, generator=generator)
    targets = [torch.randint(num_classes, (count,), generator=generator) for count in (num_train, num_eval)]
    parts = loaders.dataloaders(*(_RepeatedImages(images, part) for part in targets))
    names = tuple(f"class {number}" for number in range(num_classes))
    return ImageDataloaders(*parts, names, image_size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class _RepeatedImages(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index % len(self.images)], self.targets[index]
