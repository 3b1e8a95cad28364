"""Adds a residual to some rows of a batch, moving as few rows as possible."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from .torch_internals import is_transforming


def add_to_rows(
    x: Tensor,
    chosen: np.ndarray,
    residual: Callable[[Tensor], Tensor],
    *,
    shortcut: Callable[[Tensor], Tensor] | None = None,
    alpha: float = 1.0,
    relu: bool = False,
    dim: int = 0,
) -> Tensor:
    """``shortcut(x)`` for the whole batch, plus `alpha` times ``residual(rows)`` at the chosen rows.

    Args:
        x: A batch with N rows in dimension `dim`.
        chosen: Booleans ``(N,)`` on the host, of which at least one and not all are true.
        residual: Maps the K chosen rows, in order, to K new rows of the shape of the shortcut's. It must not
            change its input in place, which may be a part of `x`.
        shortcut: Maps the N rows to N new rows; by default the identity.
        alpha: The factor of the residual.
        relu: Whether the sums at the chosen rows, and they only, go through a ReLU.
        dim: The dimension that counts the rows, before and after.

    Returns:
        A new batch of the shape of the shortcut's result.
    """
    runs = _Runs(chosen, dim)
    if is_transforming():
        rest = x if shortcut is None else shortcut(x)
        total = torch.add(runs.take(rest), residual(runs.take(x)), alpha=alpha)
        return runs.put(rest, total.relu() if relu else total)
    if shortcut is None:
        rows, base, rest = _TakeRows.apply(x, runs, True)
        return _PutSum.apply(rest, base, residual(rows), alpha, relu, runs)
    rows, rest = _TakeRows.apply(x, runs, False)
    return _PutSum.apply(shortcut(rest), None, residual(rows), alpha, relu, runs)


def take_rows(x: Tensor, chosen: np.ndarray, dim: int = 0) -> Tensor:
    """The chosen rows of a batch, in order; a view if they are contiguous."""
    return _Runs(chosen, dim).take(x)


class _Runs:
    """The runs of chosen and of other rows, each moved as one piece: ``[T, T, F, T]`` has runs of 2, 1 and 1."""

    def __init__(self, chosen: np.ndarray, dim: int) -> None:
        ends = [0, *(np.flatnonzero(chosen[1:] != chosen[:-1]) + 1).tolist(), len(chosen)]
        spans = [(start, end - start) for start, end in pairwise(ends)]
        first = 0 if chosen[0] else 1
        self._chosen, self._others, self._dim = spans[first::2], spans[1 - first :: 2], dim
        self._among_chosen, start = [], 0
        for _, length in self._chosen:
            self._among_chosen.append((start, length))
            start += length

    def pieces(self, x: Tensor) -> list[Tensor]:
        """The runs of chosen rows of a whole batch."""
        return self._cut(x, self._chosen)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The chosen rows as one tensor."""
        return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), self._dim)

    def take(self, x: Tensor) -> Tensor:
        """The chosen rows of a whole batch, in order; a view if they are one piece."""
        return self.join(self.pieces(x))

    def put_sum(self, rest: Tensor, base: Tensor | None, rows: Tensor, alpha: float = 1.0) -> Tensor:
        """The whole batch `rest` with ``base + alpha * rows`` in place of its chosen rows.

        Every row is written once, directly to its final position, in the memory format of `rest`. Without `base`,
        the residual is added to the chosen rows of `rest`.
        """
        if torch.is_grad_enabled():  # a backward pass that will itself be differentiated
            base = self.take(rest) if base is None else base
            return self.put(rest, torch.add(base, rows, alpha=alpha))
        total = torch.empty_like(rest, dtype=torch.promote_types(rest.dtype, rows.dtype))
        for target, other in zip(self._cut(total, self._others), self._cut(rest, self._others), strict=True):
            target.copy_(other)
        bases = self.pieces(rest) if base is None else self._cut(base, self._among_chosen)
        for target, one, other in zip(self.pieces(total), bases, self._cut(rows, self._among_chosen), strict=True):
            torch.add(one, other, alpha=alpha, out=target)
        return total

    def put(self, rest: Tensor, rows: Tensor) -> Tensor:
        """The whole batch `rest` with `rows` in place of its chosen rows."""
        cut = [
            *zip(self._others, self._cut(rest, self._others), strict=True),
            *zip(self._chosen, self._cut(rows, self._among_chosen), strict=True),
        ]
        return torch.cat([piece for _, piece in sorted(cut, key=lambda pair: pair[0])], self._dim)

    def _cut(self, x: Tensor, spans: list[tuple[int, int]]) -> list[Tensor]:
        return [x.narrow(self._dim, start, length) for start, length in spans]


# `torch.func` transforms the plain operations in `add_to_rows`. Without these functions, autograd would pad the
# gradients of rows and rest with zeros, in contiguous format, and add them; and a ReLU on the chosen rows would be
# computed in a separate tensor and then copied. Here the chosen rows are moved at most once in each direction, the
# others once. Gradients get the memory format of the values, since one in another format makes every operation before
# it convert (twice the time of a block in channels-last).


class _TakeRows(Function):
    """Returns the chosen rows, optionally a second time as the base of a sum, and the whole batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runs: _Runs, with_base: bool) -> tuple[Tensor, ...]:
        ctx.runs, ctx.format = runs, _format_of(x)
        rows = runs.take(x)
        return (rows, rows.view_as(rows), x.view_as(x)) if with_base else (rows, x.view_as(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # With a base, the chosen rows of the rest were replaced, so their gradients are not used.
        rows, *base, rest = grads
        rest = rest.contiguous(memory_format=ctx.format)
        return ctx.runs.put_sum(rest, base[0] if base else None, rows), None, None


class _PutSum(Function):
    """Adds the residual to the base, or without one to the chosen rows of the rest."""

    @staticmethod
    def forward(
        ctx: Any, rest: Tensor, base: Tensor | None, rows: Tensor, alpha: float, relu: bool, runs: _Runs
    ) -> Tensor:
        ctx.runs, ctx.alpha, ctx.relu, ctx.has_base = runs, alpha, relu, base is not None
        ctx.format = _format_of(rest)
        total = runs.put_sum(rest, base, rows, alpha)
        if relu:
            for piece in runs.pieces(total):
                piece.relu_()
            ctx.save_for_backward(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None, None]:
        runs: _Runs = ctx.runs
        grad = grad.contiguous(memory_format=ctx.format)
        pieces = runs.pieces(grad)
        if ctx.relu:
            (total,) = ctx.saved_tensors
            pieces = [_relu_backward(g, out) for g, out in zip(pieces, runs.pieces(total), strict=True)]
        rows = runs.join(pieces)
        of_residual = rows if ctx.alpha == 1 else rows * ctx.alpha
        return grad, rows if ctx.has_base else None, of_residual, None, None, None


def _relu_backward(grad: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, out, 0)  # what torch's own ReLU calls


def _format_of(x: Tensor) -> torch.memory_format:
    is_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_channels_last else torch.contiguous_format
