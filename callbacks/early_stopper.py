"""Ends the training when a metric no longer improves."""

import math
from typing import Any

from ..engine import State, Time, Timestamp, TimeUnit, as_time
from ..engine.checks import check_number
from .metric_stopper import Comparison, MetricStopper


class EarlyStopper(MetricStopper):
    """Ends the training when a metric has not improved for longer than `patience`.

    .. code-block:: python

        EarlyStopper("accuracy", "eval", patience="3ep")

    Args:
        monitor: Name of the metric in ``model.get_metrics``, or ``"loss"``.
        dataloader_label: Name of the evaluation data, ``"eval"`` if there is only one set; ``"train"`` for the mean
            over each epoch of training.
        comp: ``"less"`` (or ``"lt"``), ``"greater"`` (``"gt"``), or a function of the latest and the best value, as
            tensors, that tells whether the latest is better. By default less for names with "loss", "error" or
            "perplexity", greater for all others.
        min_delta: Smallest difference from the best value that counts as an improvement, exclusive, at least 0.
        patience: How long the metric may fail to improve, in epochs or batches; an int is in epochs.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is invalid. An unknown metric is an error when training starts.
    """

    def __init__(
        self,
        monitor: str,
        dataloader_label: str = "eval",
        comp: str | Comparison | None = None,
        min_delta: float = 0.0,
        patience: int | str | Time = 1,
    ) -> None:
        super().__init__(monitor, dataloader_label, comp)
        self.min_delta = check_number("min_delta", min_delta, ge=0)
        self.patience = as_time(patience, "patience", TimeUnit.EPOCH)
        if self.patience.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH) or self.patience < 0:
            raise ValueError(f'patience must be at least 0 and in "ep" or "ba", got "{self.patience}"')
        self._best: float | None = None
        self._improved_at = Timestamp()

    def should_stop(self, value: float, state: State) -> bool:
        """Whether the metric has not improved for longer than `patience`."""
        if self._best is None or math.isnan(self._best) or self._is_improvement(value, self._best):
            self._best, self._improved_at = value, state.timestamp
        unit = self.patience.unit
        return state.timestamp.get(unit) - self._improved_at.get(unit) > self.patience

    def _is_improvement(self, value: float, best: float) -> bool:
        return self.is_better(value, best) and abs(value - best) > self.min_delta

    def state_dict(self) -> dict[str, Any]:
        """The best value, when it was reached, and whether training was stopped."""
        return {**super().state_dict(), "best": self._best, "improved_at": self._improved_at.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self._best = None if state["best"] is None else float(state["best"])
        self._improved_at = Timestamp.from_state_dict(state["improved_at"])
