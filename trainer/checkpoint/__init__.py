"""Checkpoints: their contents, writing, reading, finding and saving them."""

from .file import CheckpointError
from .saver import CheckpointSaver
from .weights import load_evaluation_factors, load_weights

__all__ = ["CheckpointError", "CheckpointSaver", "load_evaluation_factors", "load_weights"]
