"""The algorithms, each in its own folder with a README."""

from .activation_checkpointing import ActivationCheckpointing
from .blurpool import BlurPool
from .channels_last import ChannelsLast
from .cutmix import CutMix
from .ema import EMA
from .gradient_clipping import GradientClipping
from .label_smoothing import LabelSmoothing
from .mixup import MixUp
from .progressive_resizing import ProgressiveResizing
from .sam import SAM
from .stochastic_depth import ProgressiveLayerDrop, StartLate, StochasticDepth, StopEarly, Warmup

__all__ = [
    "EMA",
    "SAM",
    "ActivationCheckpointing",
    "BlurPool",
    "ChannelsLast",
    "CutMix",
    "GradientClipping",
    "LabelSmoothing",
    "MixUp",
    "ProgressiveLayerDrop",
    "ProgressiveResizing",
    "StartLate",
    "StochasticDepth",
    "StopEarly",
    "Warmup",
]
