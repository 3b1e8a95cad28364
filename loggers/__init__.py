"""Destinations of metrics: files, the terminal, memory, TensorBoard and Weights & Biases; the logger itself."""

from ..engine import Logger, LoggerDestination
from .console_logger import ConsoleLogger
from .file_logger import FileLogger
from .in_memory_logger import InMemoryLogger
from .progress_bar import ProgressBar
from .tensorboard_logger import TensorboardLogger
from .wandb_logger import WandBLogger

__all__ = [
    "ConsoleLogger",
    "FileLogger",
    "InMemoryLogger",
    "Logger",
    "LoggerDestination",
    "ProgressBar",
    "TensorboardLogger",
    "WandBLogger",
]
