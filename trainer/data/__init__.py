"""Reads dataloaders so that a run can be resumed at any batch, and divides every batch among the ranks."""

from .reader import EpochReader

__all__ = ["EpochReader"]
