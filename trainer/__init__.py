"""The training loop and what belongs to the machine: data movement, precision, progress, files."""

from .checkpoint_file import CheckpointError
from .checkpoint_saver import CheckpointSaver
from .distributed import RankLostError
from .file_logger import FileLogger
from .interruption import TrainingInterrupted
from .progress_bar import ProgressBar
from .resumption import load_weights
from .trainer import Trainer

__all__ = [
    "CheckpointError",
    "CheckpointSaver",
    "FileLogger",
    "ProgressBar",
    "RankLostError",
    "Trainer",
    "TrainingInterrupted",
    "load_weights",
]
