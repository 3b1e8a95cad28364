"""Compute something on some rows of a batch and leave the others where they are."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def replace_rows(x: Tensor, chosen: np.ndarray, function: Callable[[Tensor], Tensor], dim: int = 0) -> Tensor:
    """Give the chosen rows to `function` and put what it returns in their place.

    Runs of neighbouring rows are moved as one piece by ``split`` and ``cat``, because their
    gradients are ``cat`` and ``split`` again: one copy each way. Indexing would fill and add
    tensors of zeros in the backward pass, and its kernels cost up to four times a copy on a CPU.

    Args:
        x: A batch with N rows in dimension `dim`.
        chosen: Booleans ``(N,)`` on the host, of which at least one and not all are true.
        function: Maps the K chosen rows, in order, to K new rows.
        dim: The dimension that counts the rows.

    Returns:
        A new batch of the shape of `x`.
    """
    sizes = _run_lengths(chosen)
    pieces = list(x.split(sizes, dim))
    first = 0 if chosen[0] else 1
    new = function(torch.cat(pieces[first::2], dim))
    pieces[first::2] = new.split(sizes[first::2], dim)
    return torch.cat(pieces, dim)


def take_rows(x: Tensor, chosen: np.ndarray, dim: int = 0) -> Tensor:
    """The chosen rows of a batch, in order, as a new tensor."""
    first = 0 if chosen[0] else 1
    return torch.cat(x.split(_run_lengths(chosen), dim)[first::2], dim)


def _run_lengths(chosen: np.ndarray) -> list[int]:
    """Lengths of the runs of equal values: ``[T, T, F, T]`` gives ``[2, 1, 1]``."""
    ends = np.flatnonzero(chosen[1:] != chosen[:-1]) + 1
    return np.diff(ends, prepend=0, append=len(chosen)).tolist()
