"""MixUp (Zhang et al. 2018)."""

from .mixup import MixUp, mixup_batch

__all__ = ["MixUp", "mixup_batch"]
