"""What happens when: events, time, state, and the interfaces that answer events."""

from .algorithm import Algorithm
from .callback import Callback
from .engine import Engine, Pass, Trace
from .event import Event
from .logger import Logger, LoggerDestination
from .state import State
from .time import Time, Timestamp, TimeUnit, as_time

__all__ = [
    "Algorithm",
    "Callback",
    "Engine",
    "Event",
    "Logger",
    "LoggerDestination",
    "Pass",
    "State",
    "Time",
    "TimeUnit",
    "Timestamp",
    "Trace",
    "as_time",
]
