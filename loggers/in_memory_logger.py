"""Keeps metrics in memory, for notebooks and tests."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..engine import Logger, LoggerDestination, State, Timestamp
from ..engine.logger_destination import Metric
from .buffered import plain


class InMemoryLogger(LoggerDestination):
    """Keeps everything that is logged. A resumed run includes what was logged before its checkpoint.

    Attributes:
        data: For each name the list of ``(timestamp, value)``. The timestamp's ``batch`` is the number of the batch
            that the value belongs to.
        most_recent_values: The latest value of each name.
        most_recent_timestamps: The timestamp of the latest value of each name.
        hyperparameters: The settings of the run.
    """

    def __init__(self) -> None:
        self.data: dict[str, list[tuple[Timestamp, Metric]]] = {}
        self.most_recent_values: dict[str, Metric] = {}
        self.most_recent_timestamps: dict[str, Timestamp] = {}
        self.hyperparameters: dict[str, Any] = {}
        self._state: State | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Keep the state for its timestamp."""
        self._state = state

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Keep the settings."""
        self.hyperparameters.update(hyperparameters)

    def log_metrics(self, metrics: Mapping[str, Metric], step: int) -> None:
        """Keep the values. Tensors are copied, and stay on their device."""
        timestamp = (Timestamp() if self._state is None else self._state.timestamp).copy(batch=step)
        for name, value in metrics.items():
            self._keep(name, timestamp, value.detach().clone() if isinstance(value, Tensor) else value)

    def get_timeseries(self, metric: str) -> dict[str, np.ndarray[Any, Any]]:
        """The values of a metric over time, for a plot.

        Returns:
            Arrays of one length: the values under the name of the metric, and the counters of their timestamps as
            ``epoch``, ``batch``, ``sample``, ``batch_in_epoch`` and ``sample_in_epoch``.

        Raises:
            ValueError: If nothing was logged under this name.
        """
        if metric not in self.data:
            raise ValueError(f"metric must be one that was logged, {', '.join(self.data) or 'none'}, got {metric!r}")
        timestamps = [timestamp.state_dict() for timestamp, _ in self.data[metric]]
        values = [plain({metric: value})[metric] for _, value in self.data[metric]]
        counters = {name: np.array([counts[name] for counts in timestamps]) for name in timestamps[0]}
        return {metric: np.array(values), **counters}

    def state_dict(self) -> dict[str, Any]:
        """All values with their timestamps."""
        return {
            name: [[timestamp.state_dict(), plain({name: value})[name]] for timestamp, value in values]
            for name, values in self.data.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace all values by those of `state_dict`."""
        self.data, self.most_recent_values, self.most_recent_timestamps = {}, {}, {}
        for name, values in state.items():
            for counts, value in values:
                self._keep(name, Timestamp.from_state_dict(counts), value)

    def _keep(self, name: str, timestamp: Timestamp, value: Metric) -> None:
        self.data.setdefault(name, []).append((timestamp, value))
        self.most_recent_values[name] = value
        self.most_recent_timestamps[name] = timestamp
