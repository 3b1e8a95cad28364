"""Progressive resizing: training begins with smaller images, which take less time, and ends with whole ones."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...engine import Algorithm, Event, Logger, State
from ...engine.checks import check_int, check_number
from ...engine.generator import step_generator
from ..exclusion import check_only_one
from ..tensors import tensor_at

Mode = Literal["resize", "crop"]


def resize_batch(
    input: Tensor,
    target: Tensor,
    scale_factor: float,
    mode: Mode = "resize",
    resize_targets: bool = False,
    *,
    generator: np.random.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Make images smaller.

    Args:
        input: Images ``(N, C, H, W)``.
        target: Their targets, ``(N, ...)``.
        scale_factor: Of H and W, in (0, 1]; the new sizes are rounded.
        mode: ``"resize"`` interpolates (bilinear, antialiased), ``"crop"`` cuts out a random part, the same of all
            images.
        resize_targets: Whether to do the same with the targets, ``(N, H, W)`` or ``(N, C, H, W)``; those of an integer
            type get the value of the nearest pixel. Their H and W may be others than those of the images.
        generator: Of the place of the crop; by default one that is seeded from torch's global generator.

    Returns:
        Images and targets; the same tensors where nothing changes.

    Raises:
        ValueError: If an argument is out of range, `input` is not of four dimensions, or targets that are to be resized
            are of fewer than three.
    """
    check_mode(mode)
    check_number("scale_factor", scale_factor, gt=0, le=1)
    if input.dim() != 4:
        raise ValueError(f"input must be images (N, C, H, W) to be resized, got shape {tuple(input.shape)}")
    height, width = (max(1, round(size * scale_factor)) for size in input.shape[-2:])
    return _resize(input, target, (height, width), mode, resize_targets, generator)


def check_mode(mode: str) -> None:
    """Validate `mode`."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be 'resize' or 'crop', got {mode!r}")


@dataclass(eq=False, repr=False)
class ProgressiveResizing(Algorithm):
    """Trains on smaller images first, and on whole ones at the end.

    The scale of H and W is `initial_scale` for the first `delay_fraction` of the training, then rises linearly, and is
    1 for the last `finetune_fraction`. It is a function of the elapsed fraction of the training. At BATCH_END the batch
    is the original one. Evaluation is not changed.

    Logs ``progressive_resizing/height``, ``progressive_resizing/width`` and ``progressive_resizing/scale_factor``.

    Args:
        mode: ``"resize"`` interpolates (bilinear, antialiased), ``"crop"`` cuts out a random part, the same of all
            images of a batch.
        initial_scale: Of H and W at the beginning, in (0, 1).
        finetune_fraction: Fraction of the training with whole images at its end, in [0, 1].
        delay_fraction: Fraction of the training before the scale rises, in [0, 1].
        size_increment: H and W are rounded to a multiple of this many pixels, until they are whole.
        resize_targets: Whether to do the same with the targets, as of segmentation, see `resize_batch`.
        input_key: Where a batch has the images ``(N, C, H, W)``, as in `State.batch_get_item`.
        target_key: Where a batch has the targets.

    Raises:
        TypeError: If `resize_targets` is not a bool.
        ValueError: If an argument is out of range, or the two fractions add up to more than 1; at INIT, if there is a
            second one, or the elapsed fraction is unknown; at the first batch, if it has no images.
    """

    mode: Mode = "resize"
    initial_scale: float = 0.5
    finetune_fraction: float = 0.2
    delay_fraction: float = 0.5
    size_increment: int = 4
    resize_targets: bool = False
    input_key: Any = 0
    target_key: Any = 1

    def __post_init__(self) -> None:
        check_mode(self.mode)
        check_number("initial_scale", self.initial_scale, gt=0, lt=1)
        check_number("finetune_fraction", self.finetune_fraction, ge=0, le=1)
        check_number("delay_fraction", self.delay_fraction, ge=0, le=1)
        if self.delay_fraction + self.finetune_fraction > 1:
            raise ValueError(
                "delay_fraction and finetune_fraction must add up to at most 1, got "
                f"{self.delay_fraction} and {self.finetune_fraction}"
            )
        check_int("size_increment", self.size_increment, ge=1)
        if not isinstance(self.resize_targets, bool):
            raise TypeError(f"resize_targets must be True or False, got {self.resize_targets!r}")
        self._original_batch: Any = None

    @property
    def depends_on_duration(self) -> bool:
        """True: the scale follows the elapsed fraction of the training."""
        return True

    def check_state(self, state: State) -> None:
        """Refuse a second one, and data without a length, of which no fraction is known.

        Raises:
            ValueError: If there is one.
        """
        check_only_one(self, state, "the images of a batch have one size")
        if state.max_duration is not None:
            state.get_elapsed_duration()

    def scale(self, state: State) -> float:
        """The scale of H and W at this moment, before it is rounded to sizes, in (0, 1]."""
        elapsed = state.get_elapsed_duration().value
        rise = 1 - self.delay_fraction - self.finetune_fraction
        if elapsed < self.delay_fraction:
            return self.initial_scale
        # As 0.8 - 0.5 is a little below 1 - 0.5 - 0.2.
        risen = 1.0 if elapsed >= 1 - self.finetune_fraction - 1e-9 else (elapsed - self.delay_fraction) / rise
        return self.initial_scale + (1 - self.initial_scale) * risen

    def match(self, event: Event, state: State) -> bool:
        """At the beginning and the end of each batch."""
        return event is Event.BATCH_START or event is Event.BATCH_END

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Resize the batch, or restore it."""
        if event is Event.BATCH_END:
            state.batch, self._original_batch = self._original_batch, None
            return
        self._original_batch = state.batch
        images, targets = tensor_at(state, self, "input_key"), None
        if images.dim() != 4:
            raise ValueError(f"ProgressiveResizing needs images (N, C, H, W), got shape {tuple(images.shape)}")
        if self.resize_targets:
            targets = tensor_at(state, self, "target_key")
        scale = self.scale(state)
        height, width = (_round_to_increment(size, scale, self.size_increment) for size in images.shape[-2:])
        generator = step_generator(state.seed, int(state.timestamp.batch), stream=3)
        resized = _resize(
            images,
            images if targets is None else targets,
            (height, width),
            self.mode,
            self.resize_targets,
            generator,
        )
        state.batch_set_item(self.input_key, resized[0])
        if targets is not None:
            state.batch_set_item(self.target_key, resized[1])
        logger.log_metrics(
            {
                "progressive_resizing/height": height,
                "progressive_resizing/width": width,
                "progressive_resizing/scale_factor": scale,
            }
        )


def _round_to_increment(size: int, scale: float, increment: int) -> int:
    """The nearest multiple of `increment`, but at least one and not above `size`."""
    if scale == 1:
        return size
    return min(max(round(size * scale / increment), 1) * increment, size)


def _resize(
    input: Tensor,
    target: Tensor,
    size: tuple[int, int],
    mode: Mode,
    resize_targets: bool,
    generator: np.random.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Images and, if asked for, targets in another size; the same tensors where it is theirs already."""
    if resize_targets and target.dim() < 3:
        raise ValueError(f"target must be of shape (N, H, W) or (N, C, H, W) to be resized, got {tuple(target.shape)}")
    whole = (input.shape[-2], input.shape[-1])
    if size == whole:
        return input, target
    if mode == "resize":
        resized = _interpolate(input, size)
        return resized, _interpolate(target, _in_proportion(target, whole, size)) if resize_targets else target
    random = np.random.default_rng(int(torch.randint(2**63 - 1, ()))) if generator is None else generator
    corner = (int(random.integers(whole[0] - size[0] + 1)), int(random.integers(whole[1] - size[1] + 1)))
    cropped = _crop(input, corner, size)
    if not resize_targets:
        return cropped, target
    return cropped, _crop(target, _in_proportion(target, whole, corner), _in_proportion(target, whole, size))


def _in_proportion(target: Tensor, whole: tuple[int, int], part: tuple[int, int]) -> tuple[int, int]:
    """What is `part` of images of size `whole`, in pixels of targets that may have another size."""
    height, width = (
        of_target * of_part // of_whole
        for of_target, of_part, of_whole in zip(target.shape[-2:], part, whole, strict=True)
    )
    return height, width


def _crop(images: Tensor, corner: tuple[int, int], size: tuple[int, int]) -> Tensor:
    return images[..., corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]


def _interpolate(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing; of the nearest pixel for integers, such as classes."""
    if images.is_floating_point():
        whole = images if images.dim() == 4 else images.unsqueeze(1)
        resized = F.interpolate(whole, size, mode="bilinear", antialias=True)
        return resized if images.dim() == 4 else resized.squeeze(1)
    rows, columns = (
        ((torch.arange(new, device=images.device) + 0.5) * old / new).long()
        for new, old in zip(size, images.shape[-2:], strict=True)
    )
    return images[..., rows[:, None], columns]
