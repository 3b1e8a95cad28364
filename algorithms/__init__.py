"""The algorithms, each in its own folder with a README."""

from .activation_checkpointing import ActivationCheckpointing
from .cutmix import CutMix
from .ema import EMA
from .gradient_clipping import GradientClipping
from .label_smoothing import LabelSmoothing
from .mixup import MixUp
from .stochastic_depth import ProgressiveLayerDrop, StartLate, StochasticDepth, StopEarly, Warmup

__all__ = [
    "EMA",
    "ActivationCheckpointing",
    "CutMix",
    "GradientClipping",
    "LabelSmoothing",
    "MixUp",
    "ProgressiveLayerDrop",
    "StartLate",
    "StochasticDepth",
    "StopEarly",
    "Warmup",
]
