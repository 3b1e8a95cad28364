"""The training loop and what belongs to the machine: data movement, precision, progress, files."""

from .file_logger import FileLogger
from .progress_bar import ProgressBar
from .trainer import Trainer

__all__ = ["FileLogger", "ProgressBar", "Trainer"]
