"""Recorders of events and logged metrics."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from etude.engine import Callback, Event, LoggerDestination, State
from etude.trainer import Trainer

LOSS = "loss/eval/total"
CPUTrainer = partial(Trainer, device="cpu", progress_bar=False)


class At(Callback):
    """Calls a function with the state at one event and keeps the answers."""

    def __init__(self, event: Event, function: Callable[[State], Any]) -> None:
        self.answers: list[Any] = []
        setattr(self, event.value, lambda state, logger: self.answers.append(function(state)))


def raising(event: Event, error: BaseException) -> Callback:
    """A callback that raises at an event."""

    def fail(state: State) -> None:
        raise error

    return At(event, fail)


class Keep(LoggerDestination):
    """Keeps what is logged as ``(step, metrics)``."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.settings: list[dict[str, Any]] = []

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        self.settings.append(dict(hyperparameters))

    def column(self, name: str) -> list[tuple[int, float]]:
        return [(step, float(metrics[name])) for step, metrics in self.rows if name in metrics]


def batch_number(state: State) -> int:
    return state.timestamp.batch
