"""The training loop, with data loading, precision, distributed training and checkpoints."""

from .checkpoint import CheckpointError, CheckpointSaver, load_evaluation_factors, load_weights
from .distributed import RankLostError
from .reproducibility import seed_all
from .signals import TrainingInterrupted
from .trainer import Trainer

__all__ = [
    "CheckpointError",
    "CheckpointSaver",
    "RankLostError",
    "Trainer",
    "TrainingInterrupted",
    "load_evaluation_factors",
    "load_weights",
    "seed_all",
]
