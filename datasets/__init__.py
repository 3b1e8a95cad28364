"""Datasets, as pairs of training and test dataloaders."""

from .digits import digits_dataloaders

__all__ = ["digits_dataloaders"]
