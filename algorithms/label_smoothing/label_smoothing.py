"""Label smoothing: targets that give some probability to the other classes."""

from dataclasses import dataclass
from numbers import Real
from typing import Any

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
        # As one_hot, which reads the targets on the CPU to check them.
        target = target.new_zeros(logits.shape).scatter_(1, target.unsqueeze(1), 1)
    elif target.shape != logits.shape:
        shape, wanted = tuple(target.shape), tuple(logits.shape)
        raise ValueError(f"target must be of shape {wanted[:1]} or {wanted} for these logits, got {shape}")
    return target * (1 - smoothing) + smoothing / logits.shape[1]


def check_smoothing(smoothing: float) -> float:
    """Validate `smoothing`: a number in [0, 1]."""
    if isinstance(smoothing, bool) or not isinstance(smoothing, Real):
        raise TypeError(f"smoothing must be a number in [0, 1], got {smoothing!r}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be in [0, 1], got {smoothing!r}")
    return float(smoothing)


@dataclass(eq=False, repr=False)
class LabelSmoothing(Algorithm):
    """Smooths the targets of the training loss; evaluation uses the original ones.

    For models whose batches are ``(inputs, targets)`` and whose loss takes probabilities. The original batch is
    restored after the loss.

    Args:
        smoothing: Weight of the uniform distribution, in (0, 1].

    Raises:
        TypeError: If `smoothing` is not a number.
        ValueError: If it is out of range; 0 is refused because it would have no effect.
    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        self.smoothing = check_smoothing(self.smoothing)
        if self.smoothing == 0:
            raise ValueError("smoothing must be above 0 to have an effect, got 0")
        self._original_batch: Any = None

    def match(self, event: Event, state: State) -> bool:
        """Before and after the loss."""
        return event is Event.BEFORE_LOSS or event is Event.AFTER_LOSS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Smooth the targets of the batch before the loss, restore the batch after it."""
        if event is Event.BEFORE_LOSS:
            self._original_batch = state.batch
            inputs, targets = state.batch
            state.batch = (inputs, smooth_labels(state.outputs, targets, self.smoothing))
        else:
            state.batch, self._original_batch = self._original_batch, None
