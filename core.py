"""The engine under Composer's name: what is imported from ``composer.core`` there is in `etude.engine` here."""

from etude.engine import (
    Algorithm,
    Callback,
    Engine,
    Evaluator,
    Event,
    Pass,
    Precision,
    State,
    Time,
    Timestamp,
    TimeUnit,
    Trace,
    get_precision_context,
)

__all__ = [
    "Algorithm",
    "Callback",
    "Engine",
    "Evaluator",
    "Event",
    "Pass",
    "Precision",
    "State",
    "Time",
    "TimeUnit",
    "Timestamp",
    "Trace",
    "get_precision_context",
]
