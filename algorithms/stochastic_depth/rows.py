"""Compute something on some rows of a batch and leave the others where they are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function


def replace_rows(x: Tensor, chosen: np.ndarray, function: Callable[[Tensor], Tensor], dim: int = 0) -> Tensor:
    """Give the chosen rows to `function` and put what it returns in their place.

    Runs of neighbouring rows are moved as one piece by ``split`` and ``cat``: one copy each way, in
    the forward and in the backward pass. Indexing would fill and add tensors of zeros in the backward
    pass, and its kernels cost up to four times a copy on a CPU.

    Args:
        x: A batch with N rows in dimension `dim`.
        chosen: Booleans ``(N,)`` on the host, of which at least one and not all are true.
        function: Maps the K chosen rows, in order, to K new rows.
        dim: The dimension that counts the rows.

    Returns:
        A new batch of the shape of `x`.
    """
    runs = _Runs(chosen, dim)
    rows, rest = _TakeRows.apply(x, runs, runs.put)
    return _PutRows.apply(rest, function(rows), runs)


def add_to_rows(
    x: Tensor,
    chosen: np.ndarray,
    shortcut: Callable[[Tensor], Tensor],
    residual: Callable[[Tensor], Tensor],
    alpha: float = 1.0,
    dim: int = 0,
) -> Tensor:
    """``shortcut(x)`` for the whole batch, plus `alpha` times ``residual(rows)`` at the chosen rows.

    Args:
        x: A batch with N rows in dimension `dim`.
        chosen: Booleans ``(N,)`` on the host, of which at least one and not all are true.
        shortcut: Maps the N rows to N new rows.
        residual: Maps the K chosen rows, in order, to K new rows of the shape of the shortcut's.
        alpha: The factor of the residual.
        dim: The dimension that counts the rows, before and after.

    Returns:
        A new batch of the shape of the shortcut's result.
    """
    runs = _Runs(chosen, dim)
    rows, rest = _TakeRows.apply(x, runs, runs.add)
    return _AddRows.apply(shortcut(rest), residual(rows), alpha, runs)


def take_rows(x: Tensor, chosen: np.ndarray, dim: int = 0) -> Tensor:
    """The chosen rows of a batch, in order, as a new tensor."""
    return _Runs(chosen, dim).take(x)


class _Runs:
    """The runs of chosen and of other rows: ``[T, T, F, T]`` has the lengths ``[2, 1, 1]``."""

    def __init__(self, chosen: np.ndarray, dim: int) -> None:
        ends = np.flatnonzero(chosen[1:] != chosen[:-1]) + 1
        self.lengths = np.diff(ends, prepend=0, append=len(chosen)).tolist()
        self.first = 0 if chosen[0] else 1
        self.dim = dim

    def take(self, x: Tensor) -> Tensor:
        return torch.cat(x.split(self.lengths, self.dim)[self.first :: 2], self.dim)

    def put(self, rest: Tensor, rows: Tensor) -> Tensor:
        pieces: list[Tensor] = list(rest.split(self.lengths, self.dim))
        pieces[self.first :: 2] = rows.split(self.lengths[self.first :: 2], self.dim)
        return torch.cat(pieces, self.dim)

    def add(self, whole: Tensor, rows: Tensor, alpha: float = 1.0) -> Tensor:
        total = whole.to(torch.result_type(whole, rows), copy=True)
        starts = np.cumsum([0, *self.lengths])[self.first : -1 : 2].tolist()
        for start, piece in zip(starts, rows.split(self.lengths[self.first :: 2], self.dim), strict=True):
            total.narrow(self.dim, start, piece.shape[self.dim]).add_(piece, alpha=alpha)
        return total


# Autograd by itself would pad the gradients of rows and rest with zeros, in the contiguous format, and add
# them. Where the rows are replaced, the rest's gradient at the chosen rows may be anything: that of the rows
# takes its place. The gradients get the memory format of the values, since one gradient in another format
# makes every operation before it convert (twice the time of a block in channels-last).


class _TakeRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, runs: _Runs, join: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        ctx.join, ctx.format = join, _format_of(x)
        return runs.take(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows, rest = (grad.contiguous(memory_format=ctx.format) for grad in grads)
        return ctx.join(rest, rows.to(rest.dtype)), None, None


class _PutRows(Function):
    @staticmethod
    def forward(ctx: Any, rest: Tensor, rows: Tensor, runs: _Runs) -> Tensor:
        ctx.runs, ctx.format, ctx.dtypes = runs, _format_of(rest), (rest.dtype, rows.dtype)
        return runs.put(rest, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad = grads[0].contiguous(memory_format=ctx.format)
        return grad.to(ctx.dtypes[0]), ctx.runs.take(grad).to(ctx.dtypes[1]), None


class _AddRows(Function):
    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, residual: Tensor, alpha: float, runs: _Runs) -> Tensor:
        ctx.runs, ctx.alpha = runs, alpha
        ctx.format, ctx.dtypes = _format_of(shortcut), (shortcut.dtype, residual.dtype)
        return runs.add(shortcut, residual, alpha)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad = grads[0].contiguous(memory_format=ctx.format)
        rows = ctx.runs.take(grad)
        rows = rows if ctx.alpha == 1 else rows * ctx.alpha
        return grad.to(ctx.dtypes[0]), rows.to(ctx.dtypes[1]), None, None


def _format_of(x: Tensor) -> torch.memory_format:
    is_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_channels_last else torch.contiguous_format
