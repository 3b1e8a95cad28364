"""Stochastic depth (Huang et al. 2016): the algorithm, its functional form, and what they are made of."""

from .block_types import register_residual_block
from .export import export_network
from .fold import fold_stochastic_depth
from .savings import BlockCost, Savings, expected_savings
from .schedules import ProgressiveLayerDrop, StartLate, StopEarly, Warmup
from .stochastic_depth import StochasticDepth
from .surgery import apply_stochastic_depth, compile_stochastic_blocks, remove_stochastic_depth, stochastic_blocks

__all__ = [
    "BlockCost",
    "ProgressiveLayerDrop",
    "Savings",
    "StartLate",
    "StochasticDepth",
    "StopEarly",
    "Warmup",
    "apply_stochastic_depth",
    "compile_stochastic_blocks",
    "expected_savings",
    "export_network",
    "fold_stochastic_depth",
    "register_residual_block",
    "remove_stochastic_depth",
    "stochastic_blocks",
]
