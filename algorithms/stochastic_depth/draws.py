"""Draws which blocks or rows are dropped in a step: pure functions of rates and random numbers."""

from typing import Any, Literal

import numpy as np

Draws = Literal["independent", "balanced"]


def draw_blocks(
    rates: np.ndarray, groups: np.ndarray, draws: Draws, own: np.random.Generator, shared: np.random.Generator
) -> np.ndarray:
    """Which blocks are dropped, as booleans of shape ``(L,)``.

    Args:
        rates: Drop rates in [0, 1], of shape ``(L,)``.
        groups: For each block the number of its group of equal cost, from 0.
        draws: ``independent`` or ``balanced``.
        own: Random numbers of this rank.
        shared: Random numbers that all ranks have in common.
    """
    return independent_blocks(rates, own) if draws == "independent" else balanced_blocks(rates, groups, own, shared)


def draw_rows(
    rates: np.ndarray, num_rows: int, draws: Draws, own: np.random.Generator, shared: np.random.Generator
) -> np.ndarray:
    """Which rows of the batch each block keeps, as booleans of shape ``(L, num_rows)``.

    Args:
        rates: Drop rates in [0, 1], of shape ``(L,)``.
        num_rows: Rows of the batch.
        draws: ``independent`` or ``balanced``.
        own: Random numbers of this rank.
        shared: Random numbers that all ranks have in common.
    """
    if draws == "independent":
        return independent_rows(rates, num_rows, own)
    return balanced_rows(rates, num_rows, own, shared)


def independent_blocks(rates: np.ndarray, own: np.random.Generator) -> np.ndarray:
    """Decide independently for each block (Huang et al. 2016)."""
    return own.random(len(rates)) < rates


def balanced_blocks(
    rates: np.ndarray, groups: np.ndarray, own: np.random.Generator, shared: np.random.Generator
) -> np.ndarray:
    """Systematic sampling in a random order of the blocks (Madow 1949, Annals of Math. Statistics 20).

    Lay the rates end to end on a line and mark the points u, u + 1, u + 2, ... for one uniform u: a
    block whose piece holds a mark is dropped. A piece of length p holds one with probability p. Ranks
    share u and the order of the groups, so a group lies on the same stretch of the line on all of them
    and has the same number of marks; within a group each rank has its own order.
    """
    start = shared.random()
    group_positions = shared.permutation(groups.max() + 1) if groups.any() else np.zeros(1)
    order = np.argsort(group_positions[groups] + own.random(len(rates)))
    marks = np.floor(np.cumsum(rates[order]) + start)
    dropped = np.empty(len(rates), dtype=bool)
    dropped[order] = np.diff(marks, prepend=0.0) > 0
    return (dropped & (rates > 0)) | (rates >= 1)  # rates of 0 and 1 are exact, whatever the rounding of the sum


def independent_rows(rates: np.ndarray, num_rows: int, own: np.random.Generator) -> np.ndarray:
    """Decide independently for each row of each block."""
    # 32 random bits are precise enough for any rate, and take half the time of a double.
    count = len(rates) * num_rows
    bits = own.bit_generator.random_raw((count + 1) // 2).view(np.uint32)[:count].reshape(len(rates), num_rows)
    thresholds = np.minimum(np.rint(rates * 2.0**32), 2.0**32 - 1).astype(np.uint32)
    kept = bits >= thresholds[:, None]
    kept[rates >= 1] = False
    return kept


def balanced_rows(
    rates: np.ndarray, num_rows: int, own: np.random.Generator, shared: np.random.Generator
) -> np.ndarray:
    """For each block a cyclic window of rows, of about the mean length, at a random offset.

    The length is a multiple of a quarter of the batch, randomly the one above or below the mean, so that the rate is
    exact, and the same on all ranks. A window is moved in at most two pieces, and a few lengths need few kernels:
    compared with random rows and with windows of any length, it saved the most time (docs/benchmarks.md).
    """
    lengths = np.unique(np.arange(5) * num_rows // 4)
    mean = num_rows * (1 - rates)
    below = np.clip(np.searchsorted(lengths, mean, side="right") - 1, 0, len(lengths) - 2)
    share_above = (mean - lengths[below]) / (lengths[below + 1] - lengths[below])
    num_kept = lengths[below + (shared.random(len(rates)) < share_above)]
    small: Any = np.int16 if num_rows < 2**14 else np.int64  # narrow integers are compared faster
    offsets = (num_rows * own.random(len(rates))).astype(small)[:, None]
    positions = np.arange(num_rows, dtype=small) - offsets
    positions += (positions < 0) * small(num_rows)
    return positions < num_kept.astype(small)[:, None]
