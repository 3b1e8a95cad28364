"""Compares the split of a block with the block's own forward, once, before it is relied on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .branch import BlockType, Branch

_EXACT = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the largest value; kernels may sum in another order
_BY_ROWS = {torch.float64: 1e-7, torch.float32: 2e-3}  # other shapes may take other kernels, TF32 on GPUs
_HALF = 5e-2


def check_split(
    block: Any, name: str, block_type: BlockType, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse a split that does not give the block's own output, or whose rows are not samples.

    Computed in evaluation mode without gradients, so that no statistics and no random numbers move.

    Raises:
        ValueError: It names the block and the largest difference.
    """
    what = f"{name} ({block.plain_class.__qualname__})"
    with torch.no_grad(), _evaluation_mode(block):
        branches = block_type.branches_of(block, args, kwargs)
        x = x.detach()
        own = block.plain_class.forward(block, x.clone(), *args, **kwargs)
        if not isinstance(own, Tensor):
            raise ValueError(f"{what} must return a tensor to be dropped, its forward returns a {type(own).__name__}")
        split = x
        for branch in branches:
            h = branch.prepare(block, split)
            _check_branch(what, block, block_type, branch, h, args, kwargs)
            split = branch.run(block, split, 1.0, *args, **kwargs)
        _compare(f"the branches of {what} must give the block's own output", split, own, _EXACT)


def _check_branch(
    what: str, block: Any, block_type: BlockType, branch: Branch, h: Tensor, args: Any, kwargs: Any
) -> None:
    given = h.clone()
    residual = branch.residual(block, given, *args, **kwargs)
    if not isinstance(residual, Tensor):
        raise ValueError(f"a residual branch of {what} must return a tensor, got a {type(residual).__name__}")
    if not torch.equal(given, h):
        raise ValueError(f"a residual branch of {what} must not change its input in place")
    dim = block_type.get_batch_dim(block)
    num_rows = h.shape[dim]
    if num_rows < 2 or block.drop_plan.method == "block":
        return
    rows = torch.arange(0, num_rows, 2, device=h.device)
    some_args, some_kwargs = block_type.select(
        block, lambda tensor: tensor.index_select(0, rows), num_rows, args, kwargs
    )
    try:
        kept = branch.residual(block, h.index_select(dim, rows), *some_args, **some_kwargs)
        message = f"a residual branch of {what} must compute each sample by itself"
        _compare(message, kept, residual.index_select(dim, rows), _BY_ROWS)
    except (RuntimeError, IndexError, ValueError) as error:
        undeclared = [
            argument
            for argument, value in [*enumerate(args, start=1), *kwargs.items()]
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == num_rows
        ]
        advice = (
            f"; further arguments with {num_rows} rows: {undeclared}, see BlockType.row_arguments" if undeclared else ""
        )
        raise ValueError(f"{what} cannot be computed for some samples only: {error}{advice}") from error


def _compare(message: str, actual: Tensor, expected: Tensor, tolerances: dict[torch.dtype, float]) -> None:
    if actual.shape != expected.shape:
        raise ValueError(f"{message}, got shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    difference = (actual - expected).abs().max().item() if expected.numel() else 0.0
    scale = expected.abs().max().item() if expected.numel() else 0.0
    if not difference <= tolerances.get(expected.dtype, _HALF) * scale:
        raise ValueError(f"{message}, the largest difference is {difference:.3g}")


@contextmanager
def _evaluation_mode(block: nn.Module) -> Iterator[None]:
    were_training = [module for module in block.modules() if module.training]
    try:
        for module in were_training:
            module.training = False
        yield
    finally:
        for module in were_training:
            module.training = True
