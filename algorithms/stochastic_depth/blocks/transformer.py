"""`torch.nn.TransformerEncoderLayer`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .branch import BlockType, Branch


def _attention(
    block: Any,
    x: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    x = block.norm1(x) if block.norm_first else x
    mask, padding = _as_float(src_mask, x), _as_float(src_key_padding_mask, x)
    attended, _ = block.self_attn(
        x, x, x, attn_mask=mask, key_padding_mask=padding, is_causal=is_causal, need_weights=False
    )
    return block.dropout1(attended)


def _as_float(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask that is added to the attention, as both masks must be of one kind."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=x.dtype).masked_fill_(mask, float("-inf"))


def _feed_forward(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    x = block.norm2(x) if block.norm_first else x
    return block.dropout2(block.linear2(block.dropout(block.activation(block.linear1(x)))))


def _select_masks(
    block: Any,
    take: Callable[[Tensor], Tensor],
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if src_mask is not None and src_mask.dim() == 3:  # one mask per sample and head: (N * heads, L, L)
        heads = block.self_attn.num_heads
        src_mask = take(src_mask.unflatten(0, (-1, heads))).flatten(0, 1)
    if src_key_padding_mask is not None:
        src_key_padding_mask = take(src_key_padding_mask)
    return (src_mask, src_key_padding_mask, is_causal), {}


def _unless_pre_norm(norm: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda block, y: y if block.norm_first else getattr(block, norm)(y)


BLOCK_TYPES = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": BlockType(
        "TransformerEncoderLayer",
        [
            Branch(
                _attention,
                after_sum=_unless_pre_norm("norm1"),
                last_layer="self_attn.out_proj",
                layers=lambda block: [block.self_attn, *([block.norm1] if block.norm_first else [])],
            ),
            Branch(
                _feed_forward,
                after_sum=_unless_pre_norm("norm2"),
                last_layer="linear2",
                layers=lambda block: [block.linear1, block.linear2, *([block.norm2] if block.norm_first else [])],
            ),
        ],
        batch_dim=lambda block: 0 if block.self_attn.batch_first else 1,
        row_arguments=_select_masks,
    ),
}
