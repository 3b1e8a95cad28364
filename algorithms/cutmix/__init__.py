"""CutMix (Yun et al. 2019)."""

from .cutmix import CutMix, cutmix_batch

__all__ = ["CutMix", "cutmix_batch"]
