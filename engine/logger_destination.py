"""The interface of the destinations of a logger, such as a file, a progress bar or a tracking service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .callback import Callback

Metric = float | int | Tensor


class LoggerDestination(Callback):
    """Receives what the `Logger` logs. It is a callback too, so that it can flush at events.

    Only rank 0 has destinations.
    """

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Receive the settings of the run: names and plain values."""

    def log_metrics(self, metrics: Mapping[str, Metric], step: int) -> None:
        """Receive metrics.

        Args:
            metrics: Names and values. A value may be a zero-dimensional tensor on any device; read
                it late, because reading it waits for the device.
            step: Number of the batch that the values belong to, from 1; 0 before the first one.
        """
