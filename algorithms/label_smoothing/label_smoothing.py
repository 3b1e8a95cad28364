"""Label smoothing: targets that give some probability to the other classes."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...engine import Algorithm, Event, Logger, State
from ...engine.checks import check_number
from ..targets import as_probabilities
from ..tensors import logits_of, tensor_at


def smooth_labels(logits: Tensor, target: Tensor, smoothing: float = 0.1) -> Tensor:
    """Mix the targets with the uniform distribution (Szegedy et al. 2016, section 7, arXiv:1512.00567).

    Args:
        logits: Outputs of the model, ``(N, C, ...)``, such as ``(N, C)`` or ``(N, C, H, W)``; they tell the number of
            classes C.
        target: Class indices ``(N, ...)``, or probabilities ``(N, C, ...)``.
        smoothing: Weight of the uniform distribution, in [0, 1].

    Returns:
        Probabilities ``(N, C, ...)`` for a cross entropy loss: ``(1 - smoothing) * target + smoothing / C``.

    Raises:
        TypeError: If `smoothing` is not a number.
        ValueError: If `smoothing` is not in [0, 1], `target` has neither of the two shapes, or a class index is not in
            [0, C), such as the ``ignore_index`` of a loss.
    """
    check_smoothing(smoothing)
    return as_probabilities(target, logits) * (1 - smoothing) + smoothing / logits.shape[1]


def check_smoothing(smoothing: float) -> float:
    """Validate `smoothing`: a number in [0, 1]."""
    return check_number("smoothing", smoothing, ge=0, le=1)


@dataclass(eq=False, repr=False)
class LabelSmoothing(Algorithm):
    """Smooths the targets of the training loss; evaluation uses the original ones.

    For models with one tensor of logits as outputs, and a loss that takes probabilities. The original batch is
    restored after the loss.

    Args:
        smoothing: Weight of the uniform distribution, in (0, 1].
        target_key: Where a batch has the targets, as in `State.batch_get_item`.

    Raises:
        TypeError: If `smoothing` is not a number.
        ValueError: If it is out of range; 0 is refused because it would have no effect. At the first batch, if it has
            no targets.
    """

    smoothing: float = 0.1
    target_key: Any = 1

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
            targets = tensor_at(state, self, "target_key")
            state.batch_set_item(self.target_key, smooth_labels(logits_of(state, self), targets, self.smoothing))
        else:
            state.batch, self._original_batch = self._original_batch, None
