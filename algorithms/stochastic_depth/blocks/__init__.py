"""How each type of residual block splits into branches, by library, and the registry of the known types."""

from .branch import BlockType, Branch
from .registry import block_type_of, known_names, register_residual_block

__all__ = ["BlockType", "Branch", "block_type_of", "known_names", "register_residual_block"]
