"""Presets of torchvision's v2 transforms, from images of PIL to normalised tensors."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torchvision.transforms import v2

from ..engine.checks import check_int
from .normalization import Statistics

Augmentation = Literal["none", "crop_flip", "reference"]


def train_transform(
    augmentation: Augmentation, image_size: int, mean: Statistics, std: Statistics, *, resize_size: int | None = None
) -> v2.Transform:
    """The transform of training images.

    Args:
        augmentation: ``"none"``: as in evaluation. ``"crop_flip"``: padding by an eighth of the size, a random crop
            and a random flip, as for CIFAR in He et al. 2016 (section 4.2). ``"reference"``: random resized crop,
            flip, TrivialAugment (Mueller and Hutter 2021) and random erasing with probability 0.1, as in
            torchvision's reference training.
        image_size: Height and width of the result in pixels, at least 8.
        mean: Of each channel, for images in [0, 1].
        std: Of each channel, for images in [0, 1].
        resize_size: As in `eval_transform`, for ``"none"``; the others choose their crop themselves.

    Returns:
        A transform of a PIL image in RGB to a tensor ``(3, image_size, image_size)``.

    Raises:
        ValueError: If `augmentation` is unknown, or `image_size` too small.
    """
    check_image_size(image_size)
    if augmentation not in get_args(Augmentation):
        raise ValueError(f"augmentation must be one of {', '.join(get_args(Augmentation))}, got {augmentation!r}")
    if augmentation == "none":
        return eval_transform(image_size, mean, std, resize_size=resize_size)
    if augmentation == "crop_flip":
        return v2.Compose(
            [
                *_resized(image_size, image_size),
                v2.RandomCrop(image_size, padding=image_size // 8),
                v2.RandomHorizontalFlip(),
                *_normalised(mean, std),
            ]
        )
    return v2.Compose(
        [
            v2.RandomResizedCrop(image_size),
            v2.RandomHorizontalFlip(),
            v2.TrivialAugmentWide(),
            *_normalised(mean, std),
            v2.RandomErasing(p=0.1),
        ]
    )


def eval_transform(
    image_size: int, mean: Statistics, std: Statistics, *, resize_size: int | None = None
) -> v2.Transform:
    """The transform of evaluation images: the shorter side is resized, and the centre is cropped.

    Args:
        image_size: Height and width of the result in pixels, at least 8.
        mean: Of each channel, for images in [0, 1].
        std: Of each channel, for images in [0, 1].
        resize_size: Of the shorter side before the crop, at least `image_size`; by default 8/7 of it, which is
            256 for 224.

    Raises:
        ValueError: If a size is too small.
    """
    check_image_size(image_size)
    resize_size = check_resize_size(resize_size, image_size)
    return v2.Compose([*_resized(resize_size, image_size), *_normalised(mean, std)])


def check_image_size(image_size: int) -> int:
    """Validate `image_size`: an int >= 8."""
    return check_int("image_size", image_size, ge=8)


def check_resize_size(resize_size: int | None, image_size: int) -> int:
    """Validate `resize_size`: an int >= `image_size`; None is 8/7 of it."""
    if resize_size is None:
        return round(image_size * 8 / 7)
    return check_int("resize_size", resize_size, ge=image_size)


def _resized(resize_size: int, image_size: int) -> list[Callable[..., object]]:
    return [v2.Resize(resize_size), v2.CenterCrop(image_size)]


def _normalised(mean: Statistics, std: Statistics) -> list[Callable[..., object]]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
