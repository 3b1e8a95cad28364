"""Prints metrics as lines."""

import sys
from collections.abc import Mapping
from typing import Any, Literal, TextIO

from ..engine import Logger, LoggerDestination, State, Time, TimeUnit, as_time
from ..engine.logger_destination import Metric
from .buffered import plain


class ConsoleLogger(LoggerDestination):
    """Prints the latest value of every metric, once per interval and after each evaluation.

    Args:
        log_interval: How often, in epochs or batches; an int is in epochs. The last values are also
            printed at the end of training.
        stream: ``"stdout"``, ``"stderr"``, or a file that is open for text.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is invalid.
    """

    def __init__(
        self, log_interval: int | str | Time = "1ep", stream: Literal["stdout", "stderr"] | TextIO = "stderr"
    ) -> None:
        self.log_interval = as_time(log_interval, "log_interval", TimeUnit.EPOCH)
        if self.log_interval.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH) or self.log_interval <= 0:
            raise ValueError(f'log_interval must be positive and in "ep" or "ba", got "{self.log_interval}"')
        if stream not in ("stdout", "stderr") and not hasattr(stream, "write"):
            raise ValueError(f'stream must be "stdout", "stderr" or a file, got {stream!r}')
        self._stream = stream
        self._metrics: dict[str, Metric] = {}

    def log_metrics(self, metrics: Mapping[str, Metric], step: int) -> None:
        """Keep the values until they are printed."""
        self._metrics.update(metrics)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Print if the interval has elapsed."""
        self._print_if_due(state, TimeUnit.BATCH)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Print if the interval has elapsed."""
        self._print_if_due(state, TimeUnit.EPOCH)

    def eval_start(self, state: State, logger: Logger) -> None:
        """Print what was logged before, so that the results of the evaluation are printed separately."""
        self._print(state)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Print the results."""
        self._print(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Print the last values."""
        self._print(state)

    def _print_if_due(self, state: State, unit: TimeUnit) -> None:
        if unit is self.log_interval.unit and state.timestamp.get(unit) % self.log_interval == 0:
            self._print(state)

    def _print(self, state: State) -> None:
        if not self._metrics:
            return
        stream: Any = getattr(sys, self._stream) if isinstance(self._stream, str) else self._stream
        values = "  ".join(f"{name} {_text(value)}" for name, value in plain(self._metrics).items())
        stream.write(f"epoch {state.timestamp.epoch}  batch {state.timestamp.batch}:  {values}\n")
        stream.flush()
        self._metrics = {}


def _text(value: float | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
