"""Stochastic depth (Huang et al. 2016): the algorithm and its functional form."""

from .blocks import BlockType, Branch, register_block_type, register_residual_block
from .fold import fold_stochastic_depth
from .savings import BlockCost, Savings, expected_savings
from .schedules import ProgressiveLayerDrop, StartLate, StopEarly, Warmup
from .settings import Settings
from .standalone import apply_stochastic_depth, remove_stochastic_depth
from .stochastic_depth import StochasticDepth
from .surgery import compile_stochastic_blocks, copy_drop_rates, stochastic_blocks

__all__ = [
    "BlockCost",
    "BlockType",
    "Branch",
    "ProgressiveLayerDrop",
    "Savings",
    "Settings",
    "StartLate",
    "StochasticDepth",
    "StopEarly",
    "Warmup",
    "apply_stochastic_depth",
    "compile_stochastic_blocks",
    "copy_drop_rates",
    "expected_savings",
    "fold_stochastic_depth",
    "register_block_type",
    "register_residual_block",
    "remove_stochastic_depth",
    "stochastic_blocks",
]
