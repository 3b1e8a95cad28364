"""Stochastic depth (Huang et al. 2016): the algorithm, its functional form, and what they are made of."""

from .savings import Savings, expected_savings
from .stochastic_depth import StochasticDepth
from .surgery import apply_stochastic_depth, remove_stochastic_depth

__all__ = ["Savings", "StochasticDepth", "apply_stochastic_depth", "expected_savings", "remove_stochastic_depth"]
