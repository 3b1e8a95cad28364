"""Where metrics go: files and the terminal."""

from .file_logger import FileLogger
from .progress_bar import ProgressBar

__all__ = ["FileLogger", "ProgressBar"]
