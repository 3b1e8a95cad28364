"""etude: an event-driven training engine for PyTorch, with stochastic depth that skips dropped blocks.

The names below are imported on first use, so that ``import etude`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from etude.engine import (
        Algorithm,
        Callback,
        Engine,
        Evaluator,
        Event,
        Logger,
        LoggerDestination,
        State,
        Time,
        Timestamp,
        TimeUnit,
        Trace,
    )
    from etude.trainer import Trainer

__all__ = [
    "Algorithm",
    "Callback",
    "Engine",
    "Evaluator",
    "Event",
    "Logger",
    "LoggerDestination",
    "State",
    "Time",
    "TimeUnit",
    "Timestamp",
    "Trace",
    "Trainer",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("etude.trainer" if name == "Trainer" else "etude.engine"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
