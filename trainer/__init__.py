"""The training loop and what belongs to the machine: data movement, precision, progress, files."""

from .checkpoint import CheckpointError, CheckpointSaver, load_weights
from .distributed import RankLostError
from .signals import TrainingInterrupted
from .trainer import Trainer

__all__ = [
    "CheckpointError",
    "CheckpointSaver",
    "RankLostError",
    "Trainer",
    "TrainingInterrupted",
    "load_weights",
]
