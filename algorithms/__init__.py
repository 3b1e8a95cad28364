"""What changes training: each algorithm in a folder of its own, with its card."""

from .label_smoothing import LabelSmoothing
from .stochastic_depth import ProgressiveLayerDrop, StartLate, StochasticDepth, StopEarly, Warmup

__all__ = ["LabelSmoothing", "ProgressiveLayerDrop", "StartLate", "StochasticDepth", "StopEarly", "Warmup"]
