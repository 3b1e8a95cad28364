"""What stochastic depth saves: the cost of every block, counted, and the share of it that is dropped."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .stochastic_block import StochasticBlock
from .surgery import stochastic_blocks


@dataclass(frozen=True)
class BlockCost:
    """One stochastic block.

    Args:
        name: Its place in the model.
        drop_rate: Its rate in force, in [0, 1].
        macs: Multiply-accumulates per sample of the residual branch, the part that is dropped.
    """

    name: str
    drop_rate: float
    macs: int


@dataclass(frozen=True)
class Savings:
    """The counted cost of a model and what dropping saves of it.

    Args:
        blocks: The stochastic blocks, in forward order.
        total_macs: Multiply-accumulates per sample of a forward pass with every block kept.
    """

    blocks: tuple[BlockCost, ...]
    total_macs: int

    @property
    def expected(self) -> float:
        """The fraction of the training MACs that the rates in force save on average, in [0, 1]."""
        return self.share([block.drop_rate for block in self.blocks])

    @property
    def maximal(self) -> float:
        """The fraction that would be saved if every stochastic block were dropped always."""
        return self.share([1.0] * len(self.blocks))

    def share(self, dropped: Sequence[float]) -> float:
        """The fraction of the training MACs saved if of each block this share sits out.

        A backward pass costs about twice a forward pass in every layer alike, so the fraction of the
        forward MACs is also that of training.

        Args:
            dropped: For each block a number in [0, 1].
        """
        return sum(b.macs * share for b, share in zip(self.blocks, dropped, strict=True)) / self.total_macs


def expected_savings(model: nn.Module, input_shape: Sequence[int] = (3, 224, 224)) -> Savings:
    """Count what the blocks of a model cost and what its drop rates save.

    The count runs on shapes alone (the meta device): no weights are copied, nothing is computed.

    Args:
        model: A model with stochastic depth.
        input_shape: Shape of one sample, ``(C, H, W)`` for images.

    Raises:
        ValueError: If the model has no stochastic depth.
    """
    blocks = stochastic_blocks(model)
    if not blocks:
        raise ValueError(f"model must have stochastic depth to save anything, {type(model).__name__} has none")
    shadow = _shadow(model).eval()
    names = {block: name for name, block in shadow.named_modules() if isinstance(block, StochasticBlock)}
    for block in names:
        block.drop_plan.rates = [0.0] * len(blocks)
    inputs: dict[nn.Module, Any] = {}
    for block in names:
        block.register_forward_pre_hook(lambda module, args: inputs.__setitem__(module, args[0]))
    dtype = next(model.parameters()).dtype
    sample = torch.empty(1, *input_shape, dtype=dtype, device="meta")
    total = _macs(lambda: shadow((sample, None) if hasattr(model, "loss") else sample))
    costs = (
        BlockCost(names[twin], block.drop_rate, _macs(lambda twin=twin: twin.block_type.residual(twin, inputs[twin])))
        for block, twin in zip(blocks, stochastic_blocks(shadow), strict=True)
    )
    return Savings(tuple(costs), total)


def _shadow(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers have shapes and no data."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): _without_data(tensor) for tensor in tensors}
    return copy.deepcopy(model, memo)


def _without_data(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _macs(run: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2
