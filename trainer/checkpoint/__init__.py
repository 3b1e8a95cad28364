"""Checkpoints: what they hold, how they are written, read and found, and when they are saved."""

from .file import CheckpointError
from .loading import load_weights
from .saver import CheckpointSaver

__all__ = ["CheckpointError", "CheckpointSaver", "load_weights"]
