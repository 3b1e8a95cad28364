"""Real data to train on, as dataloaders."""

from .digits import digits_dataloaders

__all__ = ["digits_dataloaders"]
