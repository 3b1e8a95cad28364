"""The drop plan: which blocks, or rows of the batch, sit out in a step. Drawn at once, before the forward."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch

F = TypeVar("F", bound=Callable[..., Any])
StochasticMethod = Literal["block", "sample"]
Draws = Literal["independent", "balanced"]
Scaling = Literal["evaluation", "training"]

outside_of_graphs: Callable[[F], F] = torch.compiler.disable(
    reason="stochastic depth decides at every step which blocks run, so no single graph holds the model; compile the "
    "blocks with cf.compile_stochastic_blocks(model), or the model without fullgraph=True"
)
"""Decorator for what torch.compile must leave to Python."""


class DropPlan:
    """The rates of all stochastic blocks of a model and what was drawn from them for one step.

    The decisions are a function of ``(seed, step)`` and, only where ranks are to differ, the rank.
    No global generator is read or advanced, so whoever knows these numbers can draw the plan again.

    Args:
        rates: Drop rate of each block, in forward order, in [0, 1].
        method: ``block`` decides once per block, ``sample`` once per block and row of the batch.
        draws: ``independent`` decides each on its own (Huang et al. 2016). ``balanced`` is
            systematic sampling: every rate stays exact, and the number of dropped blocks is within one
            of its mean at every step (the number of a block's dropped rows, for ``sample``, within a
            quarter of the batch).
        seed: Seed of the run.
        same_on_all_ranks: Whether every rank drops the same blocks.
        groups: For each block the number of its group, from 0; blocks of one group cost the same.
            Balanced draws drop as many blocks of each group on every rank, and so as much work.
        scaling: Where the expectation is kept: in ``evaluation`` the branch counts ``1 - rate`` (Huang
            et al. 2016), or in ``training`` ``1 / (1 - rate)`` (as timm and torchvision do).
    """

    def __init__(
        self,
        rates: Sequence[float],
        *,
        method: StochasticMethod,
        draws: Draws = "independent",
        seed: int = 0,
        same_on_all_ranks: bool = True,
        groups: Sequence[int] | None = None,
        scaling: Scaling = "evaluation",
    ) -> None:
        self.method = method
        self.scaling = scaling
        self.set_rates(rates)
        self.draws = draws
        self.seed = seed
        self.same_on_all_ranks = same_on_all_ranks
        self.groups = np.zeros(len(rates), dtype=int) if groups is None else np.asarray(groups)
        self.dropped_blocks: list[bool] | None = None
        self._kept_rows: np.ndarray | None = None
        self._microbatch = slice(None)
        self._is_open = False
        self._num_forwards = 0  # since a backward last began
        self._backward_began = False

    def set_rates(self, rates: Sequence[float]) -> None:
        """Put new rates in force, one per block.

        Raises:
            ValueError: If one is 1 while training is scaled, which would divide by zero.
        """
        if self.scaling == "training" and max(rates) >= 1:
            raise ValueError(f'drop_rate must be below 1 with scaling="training", got {max(rates)}')
        self.rates = list(rates)

    def draw(self, step: int, *, rank: int = 0, num_rows: int = 0) -> None:
        """Decide for one step.

        Args:
            step: Number of the optimizer step, from 0.
            rank: Of this process. Ignored where all ranks are to agree.
            num_rows: Rows of the batch of this step; needed for the ``sample`` method only.
        """
        rank = 0 if self.same_on_all_ranks else rank
        rates = np.asarray(self.rates)
        own = self._generator(step, rank, stream=0)
        shared = self._generator(step, 0, stream=1) if self.draws == "balanced" else own
        if self.method == "block":
            if self.draws == "independent":
                self.dropped_blocks = _independent(rates, own).tolist()
            else:
                self.dropped_blocks = _balanced(rates, self.groups, own, shared).tolist()
            return
        rows_of = _independent_rows if self.draws == "independent" else _balanced_rows
        self._kept_rows = rows_of(rates, num_rows, own, shared)
        self._microbatch = slice(0, num_rows)

    def open(self) -> None:
        """Let blocks run in training by what was drawn."""
        self._is_open = True

    def close(self) -> None:
        """Make a training forward an error until the plan is opened again."""
        self._is_open = False

    def check_open(self) -> None:
        """Refuse a training forward that no plan was drawn for.

        A block that is computed again in the backward pass (activation checkpointing) runs by the plan
        of its forward, which is still there.

        Raises:
            RuntimeError: If there is none, or if it is not known which one it was.
        """
        if is_in_backward():
            if self._num_forwards > 1:
                raise RuntimeError(
                    "with activation checkpointing each forward's backward must come before the next forward, got "
                    f"{self._num_forwards} forwards before it: the drop plan of the first is gone"
                )
        elif not self._is_open:
            raise RuntimeError(
                "no drop plan was drawn for this forward in training: call the model that stochastic depth was applied "
                "to, not a part of it; a model that a Trainer has trained needs remove_stochastic_depth(model) and "
                "apply_stochastic_depth(model) first"
            )

    def count_forward(self) -> None:
        """Note a forward that is to have a backward of its own, where each forward draws anew."""
        self._num_forwards = 1 if self._backward_began else self._num_forwards + 1
        self._backward_began = False

    def begin_backward(self) -> None:
        """Note that the backward of a forward has begun."""
        self._backward_began = True

    def block_scale(self, block: int) -> float:
        """What the branch of `block` counts in this step: 0 where it sits out (``block`` method)."""
        assert self.dropped_blocks is not None, "draw() comes first"
        return 0.0 if self.dropped_blocks[block] else self.row_scale(block)

    def row_scale(self, block: int) -> float:
        """What the branch of `block` counts in training where it is kept."""
        return 1.0 if self.scaling == "evaluation" else 1 / (1 - self.rates[block])

    def evaluation_scale(self, block: int) -> float:
        """What the branch of `block` counts in evaluation."""
        return 1 - self.rates[block] if self.scaling == "evaluation" else 1.0

    def set_microbatch(self, start: int, num_rows: int) -> None:
        """Say which rows of the batch the next forward brings (``sample`` method)."""
        self._microbatch = slice(start, start + num_rows)

    def kept_rows(self, block: int) -> np.ndarray:
        """Which rows of the microbatch `block` computes: booleans of shape ``(rows,)``."""
        assert self._kept_rows is not None, "draw() comes first"
        return self._kept_rows[block, self._microbatch]

    def dropped_fractions(self) -> list[float]:
        """For each block, the fraction that sat out in this step: 0 or 1, or a share of the rows."""
        if self.dropped_blocks is not None:
            return [float(dropped) for dropped in self.dropped_blocks]
        assert self._kept_rows is not None, "draw() comes first"
        return (1 - self._kept_rows.mean(axis=1)).tolist()

    def _generator(self, step: int, rank: int, stream: int) -> np.random.Generator:
        # Philox is counter-based: the key names the step, the upper half of the counter rank and stream.
        return np.random.Generator(np.random.Philox(key=[self.seed % 2**64, step], counter=[0, 0, rank, stream]))


def is_in_backward() -> bool:
    """Whether autograd is running this code, as it does to compute a checkpointed forward again."""
    return torch._C._current_graph_task_id() != -1


def _independent(rates: np.ndarray, own: np.random.Generator) -> np.ndarray:
    return own.random(len(rates)) < rates


def _balanced(
    rates: np.ndarray, groups: np.ndarray, own: np.random.Generator, shared: np.random.Generator
) -> np.ndarray:
    """Systematic sampling in a random order of the blocks (Madow 1949, Annals of Math. Statistics 20).

    Lay the rates end to end on a line and mark the points u, u + 1, u + 2, ... for one uniform u: a
    block whose piece holds a mark is dropped. A piece of length p holds one with probability p. Ranks
    share u and the order of the groups, so a group lies on the same stretch of the line on all of them
    and holds as many marks; within a group each rank has its own order.
    """
    start = shared.random()
    group_places = shared.permutation(groups.max() + 1) if groups.any() else np.zeros(1)
    order = np.argsort(group_places[groups] + own.random(len(rates)))
    marks = np.floor(np.cumsum(rates[order]) + start)
    dropped = np.empty(len(rates), dtype=bool)
    dropped[order] = np.diff(marks, prepend=0.0) > 0
    return (dropped & (rates > 0)) | (rates >= 1)  # the ends exactly, however the sum was rounded


def _independent_rows(
    rates: np.ndarray, num_rows: int, own: np.random.Generator, shared: np.random.Generator
) -> np.ndarray:
    # 32 random bits are finer than any rate anyone sets, and half the work of a double.
    count = len(rates) * num_rows
    bits = own.bit_generator.random_raw((count + 1) // 2).view(np.uint32)[:count].reshape(len(rates), num_rows)
    thresholds = np.minimum(np.rint(rates * 2.0**32), 2.0**32 - 1).astype(np.uint32)
    kept = bits >= thresholds[:, None]
    kept[rates >= 1] = False
    return kept


def _balanced_rows(
    rates: np.ndarray, num_rows: int, own: np.random.Generator, shared: np.random.Generator
) -> np.ndarray:
    """For each block a cyclic window of rows, of about the mean length and with an offset of its own.

    The length is a number of quarters of the batch, the one above or below the mean at random so that
    the rate is exact, and the same on all ranks. A window is few pieces to move, and few lengths are few kernels to
    build: of random rows in groups of 1, windows in groups of 1 and windows of quarters, the last saved
    the most time (docs/benchmarks.md).
    """
    lengths = np.unique(np.arange(5) * num_rows // 4)
    mean = num_rows * (1 - rates)
    below = np.clip(np.searchsorted(lengths, mean, side="right") - 1, 0, len(lengths) - 2)
    share_above = (mean - lengths[below]) / (lengths[below + 1] - lengths[below])
    num_kept = lengths[below + (shared.random(len(rates)) < share_above)]
    small: Any = np.int16 if num_rows < 2**14 else np.int64  # small numbers are compared faster
    offsets = (num_rows * own.random(len(rates))).astype(small)[:, None]
    places = np.arange(num_rows, dtype=small) - offsets
    places += (places < 0) * small(num_rows)
    return places < num_kept.astype(small)[:, None]
