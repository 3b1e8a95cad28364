"""Mean and standard deviation of the channels of images: ImageNet's, those of the data, or given ones."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

Statistics = tuple[float, float, float]
Normalization = Literal["imagenet", "data"] | tuple[Statistics, Statistics]

IMAGENET_MEAN: Statistics = (0.485, 0.456, 0.406)
IMAGENET_STD: Statistics = (0.229, 0.224, 0.225)


def check_normalization(normalization: Any) -> Normalization:
    """Validate ``"imagenet"``, ``"data"`` or ``(mean, std)``, three numbers each, for images in [0, 1]."""
    if normalization in ("imagenet", "data"):
        return normalization
    try:
        mean, std = (tuple(float(value) for value in part) for part in normalization)
        is_valid = len(mean) == len(std) == 3 and all(0 <= value <= 1 for value in mean) and min(std) > 0
    except (TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise ValueError(
            "normalization must be 'imagenet', 'data' or (mean, std) of three channels in [0, 1], with std above 0, "
            f"got {normalization!r}"
        )
    return mean, std  # type: ignore[return-value]  # of three numbers each


def resolve(normalization: Normalization, images: Callable[[], Iterable[Tensor]]) -> tuple[Statistics, Statistics]:
    """The mean and standard deviation to normalise with.

    Args:
        normalization: As validated.
        images: Gives those of the data, of dtype uint8 ``(..., 3, H, W)``; called only if they are needed.

    Raises:
        ValueError: If a channel of the data is constant.
    """
    if normalization == "imagenet":
        return IMAGENET_MEAN, IMAGENET_STD
    return channel_statistics(images()) if normalization == "data" else normalization


def channel_statistics(images: Iterable[Tensor]) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation of each channel over all pixels, for images scaled to [0, 1].

    Args:
        images: Of dtype uint8, ``(..., 3, H, W)``.

    Raises:
        ValueError: If a channel is constant: it cannot be normalised.
    """
    count, total, squares = 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for batch in images:
        channels = batch.movedim(-3, 0).flatten(1)
        for number, channel in enumerate(channels):  # one at a time: in float64 all would take eight times the memory
            values = channel.double() / 255
            total[number] += values.sum()
            squares[number] += values.square().sum()
        count += channels.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    if std.min() < 1e-6:
        raise ValueError("normalization='data' must have images with some contrast, a channel of these is constant")
    return tuple(mean.tolist()), tuple(std.tolist())
