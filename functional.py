"""The functional form of every algorithm, for a training loop of your own: ``import etude.functional as cf``."""

from .algorithms.label_smoothing import smooth_labels
from .algorithms.stochastic_depth import apply_stochastic_depth, expected_savings, remove_stochastic_depth

__all__ = ["apply_stochastic_depth", "expected_savings", "remove_stochastic_depth", "smooth_labels"]
