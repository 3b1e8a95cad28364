"""Callbacks: early stopping, learning rates, speed and memory."""

from .early_stopper import EarlyStopper
from .lr_monitor import LRMonitor
from .memory_monitor import MemoryMonitor
from .speed_monitor import SpeedMonitor
from .threshold_stopper import ThresholdStopper

__all__ = ["EarlyStopper", "LRMonitor", "MemoryMonitor", "SpeedMonitor", "ThresholdStopper"]
