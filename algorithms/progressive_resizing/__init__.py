"""Progressive resizing: smaller images at the beginning of the training."""

from .progressive_resizing import ProgressiveResizing, resize_batch

__all__ = ["ProgressiveResizing", "resize_batch"]
