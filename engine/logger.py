"""The logger of a run: passes what algorithms, callbacks and the Trainer log on to its destinations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

if TYPE_CHECKING:
    from .callback import Callback
    from .logger_destination import LoggerDestination, Metric
    from .state import State


_log = logging.getLogger(__name__)


class Logger:
    """Passes everything that is logged on to each destination.

    A destination that fails, such as a full disk or a service that does not answer, does not end the training: the
    error is logged once, and the destination is no longer used. Its ValueError and TypeError are raised, because
    they are about what was logged.

    Args:
        state: The state whose timestamp gives the step of the metrics.
        destinations: Where the metrics go.
    """

    def __init__(self, state: State, destinations: Sequence[LoggerDestination] = ()) -> None:
        self.destinations = tuple(destinations)
        self._state = state
        self._begun_after = -1
        self._failed: list[LoggerDestination] = []

    @property
    def step(self) -> int:
        """Number of the batch that metrics belong to: from AFTER_DATALOADER on the current one, else the latest."""
        batch = self._state.timestamp.batch.value
        return batch + 1 if batch == self._begun_after else batch

    def begin_step(self) -> None:
        """Note that a batch was read: what is logged until it is finished belongs to it."""
        self._begun_after = self._state.timestamp.batch.value

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Log settings of the run."""
        for destination in self.destinations:
            self.call(destination, destination.log_hyperparameters, hyperparameters)

    def log_metrics(self, metrics: Mapping[str, Metric]) -> None:
        """Log metrics under the number of their batch, see `step`.

        A tensor that is sharded over ranks is gathered first, so every rank must log it.

        Raises:
            ValueError: If a tensor has more than one element.
        """
        metrics = {name: value if type(value) is float else _scalar(name, value) for name, value in metrics.items()}
        for destination in self.destinations:
            self.call(destination, destination.log_metrics, metrics, self.step)

    def has_failed(self, listener: Callback) -> bool:
        """Whether `destination` has failed."""
        return listener in self._failed

    def call(self, destination: LoggerDestination, method: Callable[..., Any], *args: Any) -> None:
        """Call a method of a destination, unless the destination has failed before."""
        if destination in self._failed:
            return
        try:
            method(*args)
        except (ValueError, TypeError):
            raise
        except Exception as error:
            self._failed.append(destination)
            name = type(destination).__name__
            _log.error("%s failed, training continues without it: %s: %s", name, type(error).__name__, error)


def _scalar(name: str, value: Metric) -> Metric:
    if isinstance(value, Tensor):
        if type(value) is not Tensor and hasattr(value, "full_tensor"):
            value = cast(Tensor, value.full_tensor())
        if value.numel() != 1:
            raise ValueError(f"a metric must be a number, {name!r} is a tensor of shape {tuple(value.shape)}")
    return value
