"""The algorithms, each in its own folder with a README."""

from .ema import EMA
from .gradient_clipping import GradientClipping
from .label_smoothing import LabelSmoothing
from .stochastic_depth import ProgressiveLayerDrop, StartLate, StochasticDepth, StopEarly, Warmup

__all__ = [
    "EMA",
    "GradientClipping",
    "LabelSmoothing",
    "ProgressiveLayerDrop",
    "StartLate",
    "StochasticDepth",
    "StopEarly",
    "Warmup",
]
