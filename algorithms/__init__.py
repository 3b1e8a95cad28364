"""What changes training: each algorithm in a folder of its own, with its card."""

from .label_smoothing import LabelSmoothing
from .stochastic_depth import StochasticDepth

__all__ = ["LabelSmoothing", "StochasticDepth"]
