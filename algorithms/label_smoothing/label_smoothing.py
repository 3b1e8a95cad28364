"""Label smoothing: train towards targets that leave some probability to the other classes."""

from numbers import Real
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...engine import Algorithm, Event, Logger, State


def smooth_labels(logits: Tensor, target: Tensor, smoothing: float = 0.1) -> Tensor:
    """Mix the targets with the uniform distribution (Szegedy et al. 2016, section 7, arXiv:1512.00567).

    Args:
        logits: Outputs of the model, ``(N, C)``; they tell the number of classes C.
        target: Class indices ``(N,)``, or probabilities ``(N, C)``.
        smoothing: Weight of the uniform distribution, in [0, 1].

    Returns:
        Probabilities ``(N, C)`` for a cross entropy loss: ``(1 - smoothing) * target + smoothing / C``.

    Raises:
        TypeError: If `smoothing` is not a number.
        ValueError: If `smoothing` is not in [0, 1], or `target` has neither of the two shapes.
    """
    check_smoothing(smoothing)
    if target.shape == logits.shape[:1]:
        target = F.one_hot(target, logits.shape[1])
    elif target.shape != logits.shape:
        shape, wanted = tuple(target.shape), tuple(logits.shape)
        raise ValueError(f"target must be of shape {wanted[:1]} or {wanted} for these logits, got {shape}")
    return target * (1 - smoothing) + smoothing / logits.shape[1]


def check_smoothing(smoothing: float) -> float:
    """Refuse a TypeError-worthy or out-of-range value."""
    if isinstance(smoothing, bool) or not isinstance(smoothing, Real):
        raise TypeError(f"smoothing must be a number in [0, 1], got {smoothing!r}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be in [0, 1], got {smoothing!r}")
    return float(smoothing)


class LabelSmoothing(Algorithm):
    """Smooth the targets of the training loss; evaluation sees the original ones.

    For models whose batches are ``(inputs, targets)`` and whose loss takes probabilities.

    Args:
        smoothing: Weight of the uniform distribution, in (0, 1].

    Raises:
        TypeError: If `smoothing` is not a number.
        ValueError: If it is out of range; 0 is refused because it would do nothing.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        self.smoothing = check_smoothing(smoothing)
        if self.smoothing == 0:
            raise ValueError("smoothing must be above 0 to have an effect, got 0")
        self._targets: Any = None

    def __repr__(self) -> str:
        return f"LabelSmoothing(smoothing={self.smoothing})"

    def match(self, event: Event, state: State) -> bool:
        """Around the loss."""
        return event is Event.BEFORE_LOSS or event is Event.AFTER_LOSS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Put the smoothed targets into the batch, and the original ones back."""
        inputs, targets = state.batch
        if event is Event.BEFORE_LOSS:
            self._targets = targets
            state.batch = (inputs, smooth_labels(state.outputs, targets, self.smoothing))
        else:
            state.batch = (inputs, self._targets)
            self._targets = None
