"""BlurPool: anti-aliased downsampling (Zhang 2019)."""

from .blurpool import BlurPool, apply_blurpool
from .layers import BlurConv2d, BlurMaxPool2d, blur_2d

__all__ = ["BlurConv2d", "BlurMaxPool2d", "BlurPool", "apply_blurpool", "blur_2d"]
