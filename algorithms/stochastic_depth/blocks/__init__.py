"""How each type of residual block splits, by family, and how others are traced."""

from .branch import BlockType, Branch
from .registry import block_type_of, known_names, register_block_type, register_residual_block
from .tracing import SplitError, has_marks, traced_type

__all__ = [
    "BlockType",
    "Branch",
    "SplitError",
    "block_type_of",
    "has_marks",
    "known_names",
    "register_block_type",
    "register_residual_block",
    "traced_type",
]
