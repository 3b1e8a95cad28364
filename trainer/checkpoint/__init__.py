"""Checkpoints: their contents, writing, reading, finding and saving them."""

from .file import CheckpointError
from .loading import load_weights
from .saver import CheckpointSaver

__all__ = ["CheckpointError", "CheckpointSaver", "load_weights"]
