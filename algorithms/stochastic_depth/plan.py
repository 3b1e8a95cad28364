"""The drop plan: the rates of all blocks, and which blocks or rows of the batch are dropped in a step."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from ...engine.generator import step_generator
from .draws import Draws, draw_blocks, draw_rows
from .torch_internals import is_in_backward

StochasticMethod = Literal["block", "sample"]
Scaling = Literal["evaluation", "training"]


class DropPlan:
    """The rates of all stochastic blocks of a model, and the decisions for one step.

    `draw` decides before the forward, as a function of ``(seed, step)`` and, only where ranks may differ,
    the rank. No global generator is read or advanced. `decide` sets the decisions directly, to replay a
    plan. Between `open` and `close` the blocks follow them.

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
            Balanced draws drop the same number of blocks of each group, so the same amount of work, on every rank.
        scaling: Where the expectation is kept: in ``evaluation`` the branch is multiplied by ``1 - rate``
            (Huang et al. 2016), or in ``training`` by ``1 / (1 - rate)`` (as timm and torchvision do).
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
        self.draw_for_part: Callable[[int, int], None] | None = None  # draws where only a part of the model is called
        self.follows_trainer = False
        self._is_open = False
        self._num_forwards = 0  # since the last backward began
        self._backward_began = False

    def set_rates(self, rates: Sequence[float]) -> None:
        """Set the rates, one per block.

        Raises:
            ValueError: If a rate is 1 with ``scaling="training"``, which would divide by zero.
        """
        if self.scaling == "training" and max(rates) >= 1:
            raise ValueError(f'drop_rate must be below 1 with scaling="training", got {max(rates)}')
        self.rates = list(rates)

    def draw(self, step: int, *, rank: int = 0, num_rows: int = 0) -> None:
        """Draw the decisions for one step.

        Args:
            step: Number of the optimizer step, from 0.
            rank: Rank of this process. Ignored where all ranks drop the same.
            num_rows: Rows of the batch of this step; needed for the ``sample`` method only.
        """
        rank = 0 if self.same_on_all_ranks else rank
        rates = np.asarray(self.rates)
        own = step_generator(self.seed, step, rank, stream=0)
        shared = step_generator(self.seed, step, stream=1) if self.draws == "balanced" else own
        if self.method == "block":
            self.dropped_blocks = draw_blocks(rates, self.groups, self.draws, own, shared).tolist()
        else:
            self._set_kept_rows(draw_rows(rates, num_rows, self.draws, own, shared))

    def decide(self, dropped: Any) -> None:
        """Set the decisions of a step, instead of drawing them.

        Args:
            dropped: Booleans of shape ``(L,)`` for the L blocks, or ``(L, N)`` for N rows with the
                ``sample`` method.

        Raises:
            ValueError: If `dropped` has another shape.
        """
        decisions = np.array(dropped, dtype=bool)
        expected_dims = 1 if self.method == "block" else 2
        if decisions.ndim != expected_dims or len(decisions) != len(self.rates):
            shape = f"({len(self.rates)},)" if self.method == "block" else f"({len(self.rates)}, N)"
            raise ValueError(f"dropped must be of shape {shape}, got {decisions.shape}")
        if self.method == "block":
            self.dropped_blocks = decisions.tolist()
        else:
            self._set_kept_rows(~decisions)

    @property
    def decisions(self) -> np.ndarray:
        """What is dropped in this step, in the form that `decide` takes."""
        if self.method == "block":
            assert self.dropped_blocks is not None, "draw() comes first"
            return np.array(self.dropped_blocks)
        assert self._kept_rows is not None, "draw() comes first"
        return ~self._kept_rows

    def follow_trainer(self) -> None:
        """Leave drawing to the steps of a Trainer, until `release`."""
        self.follows_trainer = True
        self._num_forwards = 0

    def release(self) -> None:
        """Close the plan; a model with hooks of its own draws again by itself."""
        self.follows_trainer = False
        self.close()

    def open(self) -> None:
        """Allow training forwards with the current decisions."""
        self._is_open = True

    def close(self) -> None:
        """Make a training forward an error until the plan is opened again."""
        self._is_open = False

    @property
    def is_open(self) -> bool:
        """Whether blocks run in training by the decisions."""
        return self._is_open

    def check_open(self) -> None:
        """Check that a plan was drawn for this training forward.

        A block that is recomputed in the backward pass (activation checkpointing) follows the plan of its forward.

        Raises:
            RuntimeError: If there is no plan, or another one was drawn since the forward.
        """
        if is_in_backward():
            if self._num_forwards > 1:
                raise RuntimeError(
                    "with activation checkpointing each forward's backward must come before the next forward, got "
                    f"{self._num_forwards} forwards before it: the drop plan of the first one was replaced"
                )
        elif not self._is_open:
            if self.follows_trainer:
                raise RuntimeError(
                    "no drop plan was drawn for this forward in training: during Trainer.fit the model may run in "
                    "training mode between BEFORE_FORWARD and BEFORE_BACKWARD only"
                )
            raise RuntimeError(
                "no drop plan was drawn for this forward in training: call the model that stochastic depth was applied "
                "to, not a part of it; a model that a Trainer has trained needs remove_stochastic_depth(model) and "
                "apply_stochastic_depth(model) first"
            )

    def count_forward(self) -> None:
        """Count a forward that will have its own backward, where each forward draws a new plan."""
        self._num_forwards = 1 if self._backward_began else self._num_forwards + 1
        self._backward_began = False

    def begin_backward(self) -> None:
        """Note that the backward of a forward has begun."""
        self._backward_began = True

    def block_scale(self, block: int) -> float:
        """The factor of the branch of `block` in this step: 0 if it is dropped (``block`` method)."""
        assert self.dropped_blocks is not None, "draw() comes first"
        return 0.0 if self.dropped_blocks[block] else self.row_scale(block)

    def row_scale(self, block: int) -> float:
        """The factor of the branch of `block` in training where it is kept."""
        return 1.0 if self.scaling == "evaluation" else 1 / (1 - self.rates[block])

    def evaluation_scale(self, block: int) -> float:
        """The factor of the branch of `block` in evaluation."""
        return 1 - self.rates[block] if self.scaling == "evaluation" else 1.0

    def set_microbatch(self, start: int, num_rows: int) -> None:
        """Set which rows of the batch the next forward gets (``sample`` method)."""
        self._microbatch = slice(start, start + num_rows)

    def kept_rows(self, block: int) -> np.ndarray:
        """Which rows of the microbatch `block` computes: booleans of shape ``(rows,)``."""
        assert self._kept_rows is not None, "draw() comes first"
        return self._kept_rows[block, self._microbatch]

    def dropped_fractions(self) -> list[float]:
        """For each block, the fraction dropped in this step: 0 or 1, or a share of the rows."""
        if self.dropped_blocks is not None:
            return [float(dropped) for dropped in self.dropped_blocks]
        assert self._kept_rows is not None, "draw() comes first"
        return (1 - self._kept_rows.mean(axis=1)).tolist()

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no Trainer."""
        return {**self.__dict__, "follows_trainer": False, "_is_open": False}

    def _set_kept_rows(self, kept: np.ndarray) -> None:
        self._kept_rows = kept
        self._microbatch = slice(0, kept.shape[1])
