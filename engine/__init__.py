"""Events, time and state of a training run, and the interfaces of algorithms, callbacks and loggers."""

from .algorithm import Algorithm
from .attached import attach, attached_algorithms, detach
from .callback import Callback
from .engine import Engine, Trace
from .evaluation_factor import EvaluationFactor
from .evaluator import Evaluator
from .event import Event
from .logger import Logger
from .logger_destination import LoggerDestination
from .passes import Pass
from .precision import Precision, get_precision_context
from .state import State
from .time import Time, TimeUnit, as_time
from .timestamp import Timestamp

__all__ = [
    "Algorithm",
    "Callback",
    "Engine",
    "EvaluationFactor",
    "Evaluator",
    "Event",
    "Logger",
    "LoggerDestination",
    "Pass",
    "Precision",
    "State",
    "Time",
    "TimeUnit",
    "Timestamp",
    "Trace",
    "as_time",
    "attach",
    "attached_algorithms",
    "detach",
    "get_precision_context",
]
