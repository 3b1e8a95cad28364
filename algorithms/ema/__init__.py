"""Exponential moving average of the weights."""

from .ema import EMA, compute_ema

__all__ = ["EMA", "compute_ema"]
