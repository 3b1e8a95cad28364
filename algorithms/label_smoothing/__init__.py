"""Label smoothing (Szegedy et al. 2016)."""

from .label_smoothing import LabelSmoothing, smooth_labels

__all__ = ["LabelSmoothing", "smooth_labels"]
