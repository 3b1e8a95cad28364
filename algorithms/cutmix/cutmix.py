"""CutMix: training on images in which a box is that of another image, and on the mixture of their targets."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ...engine.checks import check_number
from ..mixing import Mixed, Mixing, check_alpha, check_rows, draw_partners, generator_or_global

Box = tuple[int, int, int, int]


def cutmix_batch(
    input: Tensor,
    target: Tensor,
    length: float | None = None,
    alpha: float = 1.0,
    bbox: Box | None = None,
    indices: Tensor | None = None,
    uniform_sampling: bool = False,
    *,
    generator: np.random.Generator | None = None,
) -> tuple[Tensor, Tensor, float, Box]:
    """Replace a box of each image by that of another image, the same box for the whole batch (Yun et al. 2019).

    For a cross entropy, the loss is that of a mixture of the targets by area::

        inputs, partners, area, _ = cutmix_batch(inputs, targets)
        outputs = model(inputs)
        loss = area * F.cross_entropy(outputs, targets) + (1 - area) * F.cross_entropy(outputs, partners)

    Args:
        input: Images ``(N, C, H, W)``.
        target: ``(N, ...)``.
        length: Sides of the box as a fraction of H and W, in (0, 1], rounded down to even numbers of pixels. By default
            the fraction of the image that is kept is drawn from Beta(alpha, alpha), and the box has the proportions of
            the image.
        alpha: Above 0.
        bbox: The box itself, ``(left, top, right, bottom)`` in pixels, right and bottom excluded.
        indices: For each row the index of the other one, ``(N,)``; by default a random permutation.
        uniform_sampling: Whether every pixel is in the box with the same probability. By default the centre of the box
            is a random pixel of the image, as in the paper, and what is outside of the image is cut off, so that pixels
            at the border are in it less often.
        generator: Of what is drawn; by default one that is seeded from torch's global generator.

    Returns:
        The mixed images, the targets of the other rows, the fraction of the image that is kept, and the box.

    Raises:
        ValueError: If an argument is out of range, `input` is not of four dimensions, or both `length` and `bbox` are
            given.
    """
    check_rows(input, target)
    if input.dim() != 4:
        raise ValueError(f"input must be images (N, C, H, W) to be mixed, got shape {tuple(input.shape)}")
    if length is not None and bbox is not None:
        raise ValueError(f"one of length and bbox must be None, got {length!r} and {bbox!r}")
    generator = generator_or_global(generator)
    height, width = input.shape[-2:]
    if bbox is None:
        sides = _draw_sides(alpha, generator) if length is None else check_number("length", length, gt=0, le=1)
        bbox = _draw_box(height, width, sides, generator, uniform=uniform_sampling)
    left, top, right, bottom = _check_box(bbox, height, width)
    if indices is None:
        indices = draw_partners(len(input), input.device, generator)
    mixed = input.clone()
    mixed[..., top:bottom, left:right] = input[..., top:bottom, left:right][indices]
    area = 1 - (right - left) * (bottom - top) / (height * width)
    return mixed, target[indices], area, bbox


@dataclass(eq=False, repr=False)
class CutMix(Mixing):
    """Replaces a box of each image by that of another image, and mixes targets by area (Yun et al. 2019).

    See arXiv:1905.04899. The box and the pairs of rows are drawn once for the batch of each rank, as a function of the
    seed, the step and the rank. Evaluation is not changed. At BATCH_END the batch is the original one, and so are the
    targets that training metrics see. Targets for every pixel, whose last two dimensions are those of the images, are
    not mixed: their box is replaced, too.

    Args:
        alpha: Parameter of the Beta distribution of the fraction of the image that is kept, above 0.
        interpolate_loss: Whether to mix the losses for both targets instead of the targets, for a loss that takes class
            indices only. Both are the same for a loss that is linear in the targets, such as cross entropy.
        uniform_sampling: Whether every pixel is in the box with the same probability, see `cutmix_batch`.
        input_key: Where a batch has the images ``(N, C, H, W)``, as in `State.batch_get_item`.
        target_key: Where a batch has the targets: class indices ``(N,)``, probabilities ``(N, C)``, or targets for
            every pixel.

    Raises:
        TypeError: If `interpolate_loss` or `uniform_sampling` is not a bool.
        ValueError: If `alpha` is out of range; at INIT, if another algorithm mixes the batch too, or smooths targets
            that an interpolated loss does not read; at the first batch, if it has no images or no targets, or a loss is
            to be interpolated for targets of every pixel.
    """

    alpha: float = 1.0
    interpolate_loss: bool = False
    uniform_sampling: bool = False
    input_key: Any = 0
    target_key: Any = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self.alpha)
        if not isinstance(self.uniform_sampling, bool):
            raise TypeError(f"uniform_sampling must be True or False, got {self.uniform_sampling!r}")

    def mix(self, inputs: Tensor, targets: Tensor, generator: np.random.Generator) -> Mixed:
        """Replace the box of each image."""
        mixed, partners, area, box = cutmix_batch(
            inputs, targets, alpha=self.alpha, uniform_sampling=self.uniform_sampling, generator=generator
        )
        if targets.dim() < 3 or targets.shape[-2:] != inputs.shape[-2:]:
            return Mixed(mixed, targets, partners, 1 - area)
        if self.interpolate_loss:
            raise ValueError("CutMix must have interpolate_loss=False for targets of every pixel")
        left, top, right, bottom = box
        pasted = targets.clone()
        pasted[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
        return Mixed(mixed, pasted, None, 1 - area)


def _draw_sides(alpha: float, generator: np.random.Generator) -> float:
    """The sides of the box as a fraction of those of the image, where Beta(alpha, alpha) of its area is kept."""
    return math.sqrt(1 - generator.beta(check_alpha(alpha), alpha))


def _draw_box(height: int, width: int, sides: float, generator: np.random.Generator, *, uniform: bool) -> Box:
    """A box at a random place, cut off at the border of the image."""
    left, right = _draw_interval(width, sides, generator, uniform=uniform)
    top, bottom = _draw_interval(height, sides, generator, uniform=uniform)
    return left, top, right, bottom


def _draw_interval(size: int, side: float, generator: np.random.Generator, *, uniform: bool) -> tuple[int, int]:
    half = int(side * size) // 2
    # Pixel p is in the interval for the 2 * half centres p - half + 1 to p + half, which may be beyond the image.
    first, last = (min(1 - half, 0), size - 1 + half) if uniform else (0, size - 1)
    centre = int(generator.integers(first, last, endpoint=True))
    return max(centre - half, 0), min(centre + half, size)


def _check_box(box: Box, height: int, width: int) -> Box:
    left, top, right, bottom = box
    if not (0 <= left <= right <= width and 0 <= top <= bottom <= height):
        raise ValueError(
            f"bbox must be (left, top, right, bottom) within an image of height {height} and width {width}, got {box}"
        )
    return box
