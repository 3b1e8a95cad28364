"""Reads dataloaders so that a run can stop and go on anywhere, and shares every batch among the ranks."""

from .reader import EpochReader

__all__ = ["EpochReader"]
