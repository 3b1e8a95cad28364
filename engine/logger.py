"""The logger of a run: algorithms, callbacks and the trainer log to it, and it passes on to its destinations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .logger_destination import LoggerDestination, Metric
    from .state import State


class Logger:
    """Passes everything that is logged on to each destination.

    Args:
        state: The state whose timestamp gives the step of the metrics.
        destinations: Where the metrics go.
    """

    def __init__(self, state: State, destinations: Sequence[LoggerDestination] = ()) -> None:
        self.destinations = tuple(destinations)
        self._state = state

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Log settings of the run."""
        for destination in self.destinations:
            destination.log_hyperparameters(hyperparameters)

    def log_metrics(self, metrics: Mapping[str, Metric]) -> None:
        """Log metrics under the number of finished batches.

        A tensor that is sharded over ranks is gathered first, so every rank must log it.
        """
        metrics = {name: _full_tensor(value) for name, value in metrics.items()}
        for destination in self.destinations:
            destination.log_metrics(metrics, self._state.timestamp.batch.value)


def _full_tensor(value: Metric) -> Metric:
    is_subclass = isinstance(value, Tensor) and type(value) is not Tensor
    return value.full_tensor() if is_subclass and hasattr(value, "full_tensor") else value
