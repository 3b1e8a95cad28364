"""Where metrics go: one `Logger` in the loop, any number of destinations behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .callback import Callback

if TYPE_CHECKING:
    from .state import State

Metric = float | int | Tensor


class LoggerDestination(Callback):
    """A place that keeps what is logged. It is a callback too, so it can flush at events."""

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Keep settings of the run: names and plain values."""

    def log_metrics(self, metrics: Mapping[str, Metric], step: int) -> None:
        """Keep measurements.

        Args:
            metrics: Names and values. A value may be a zero-dimensional tensor on any device; read
                it late, since reading waits for the device.
            step: Number of batches that were finished when the values were logged.
        """


class Logger:
    """Hands everything that is logged to each destination.

    Args:
        state: The state whose timestamp dates the metrics.
        destinations: Where to.
    """

    def __init__(self, state: State, destinations: Sequence[LoggerDestination] = ()) -> None:
        self.destinations = tuple(destinations)
        self._state = state

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Log settings of the run."""
        for destination in self.destinations:
            destination.log_hyperparameters(hyperparameters)

    def log_metrics(self, metrics: Mapping[str, Metric]) -> None:
        """Log measurements under the number of batches finished so far.

        A tensor that is sharded over ranks is put together first, so all ranks must log it.
        """
        metrics = {name: _whole(value) for name, value in metrics.items()}
        for destination in self.destinations:
            destination.log_metrics(metrics, self._state.timestamp.batch.value)


def _whole(value: Metric) -> Metric:
    is_special = isinstance(value, Tensor) and type(value) is not Tensor
    return value.full_tensor() if is_special and hasattr(value, "full_tensor") else value
