"""The algorithms, each in its own folder with a README."""

from .label_smoothing import LabelSmoothing
from .stochastic_depth import ProgressiveLayerDrop, StartLate, StochasticDepth, StopEarly, Warmup

__all__ = ["LabelSmoothing", "ProgressiveLayerDrop", "StartLate", "StochasticDepth", "StopEarly", "Warmup"]
