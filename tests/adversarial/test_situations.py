"""Randomly generated training setups compared with a plain PyTorch loop.

Each is drawn from a seed: model, container of the batch, sampler, workers, optimizer, schedule, microbatches, drops,
layers that are unfrozen later, gradients that are edited, rows that are NaN, and a stop from which it is resumed.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from etude import Algorithm, Callback, Event, Trainer
from etude.algorithms import LabelSmoothing, StochasticDepth
from helpers.hand_written import Recorded, are_same, edit_after_backward, largest_difference, train_by_hand
from helpers.ranks import run_on_ranks
from helpers.situations import Network, Situation, inputs_and_targets

pytestmark = pytest.mark.slow

SEEDS_ON_ONE_RANK = range(200)
SEEDS_ON_TWO_RANKS = range(100)
GROUP = 20


class Stop(Exception):
    """Ends a training in the middle."""


class StopAt(Callback):
    """Raises in the middle of a training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def batch_checkpoint(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch == self.step:
            raise Stop


class Script(Algorithm):
    """Does what the situation asks for, and records what each step works on."""

    def __init__(self, situation: Situation, depth: StochasticDepth | None) -> None:
        self._situation, self._depth = situation, depth
        self._steps: dict[int, Any] = {}

    def match(self, event: Event, state: Any) -> bool:
        return event in (Event.BATCH_START, Event.AFTER_BACKWARD, Event.AFTER_TRAIN_BATCH)

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        number = int(state.timestamp.batch)
        if event is Event.BATCH_START:
            if self._situation.unfreeze_at is not None:
                state.model.stem.requires_grad_(number >= self._situation.unfreeze_at)
            x, y = inputs_and_targets(state.batch)
            self._steps[number] = (x.clone(), y.clone(), self._kept(len(x), len(state.model.blocks)))
        elif event is Event.AFTER_BACKWARD:
            edit_after_backward(state.model, self._situation)
        elif self._situation.edit == "clip":
            nn.utils.clip_grad_norm_(state.model.parameters(), 0.1)

    def _kept(self, num_rows: int, num_blocks: int) -> Tensor:
        if self._depth is None:
            return torch.ones(num_blocks, num_rows, dtype=torch.bool)
        dropped = torch.from_numpy(self._depth.plan.decisions)
        return ~(dropped if dropped.dim() == 2 else dropped[:, None].expand(-1, num_rows))


def make_trainer(situation: Situation, folder: Path, *callbacks: Callback) -> Trainer:
    model = situation.make_model()
    optimizer, scheduler = situation.make_optimizer(model)
    depth = None
    if situation.method is not None:
        depth = StochasticDepth(
            stochastic_method=situation.method,  # type: ignore[arg-type]
            drop_rate=situation.drop_rate,
            use_same_gpu_seed=situation.use_same_gpu_seed,
            draws=situation.draws,  # type: ignore[arg-type]
            scaling=situation.scaling,  # type: ignore[arg-type]
        )
    smoothing = [] if situation.smoothing is None else [LabelSmoothing(situation.smoothing)]
    return Trainer(
        model,
        situation.make_dataloader(model),
        None,
        f"{situation.num_steps}ba",
        algorithms=[*([] if depth is None else [depth]), *smoothing, Script(situation, depth)],
        optimizers=optimizer,
        schedulers=[] if scheduler is None else [scheduler],
        step_schedulers_every_batch=True,
        device_train_microbatch_size=situation.microbatch_size,
        max_nonfinite_steps=100,
        seed=situation.seed,
        save_folder=folder,
        save_interval="1ba",
        autoresume=True,
        callbacks=callbacks,
        progress_bar=False,
        dist_timeout=60.0,
    )


def train(situation: Situation, folder: Path) -> tuple[Network, list[Recorded]]:
    """Train with the Trainer, in two parts if the situation stops; the steps are those of all ranks."""
    own: dict[int, Any] = {}
    if situation.stop_at is not None:
        trainer = make_trainer(situation, folder, StopAt(situation.stop_at))
        with pytest.raises(Stop):
            trainer.fit()
        own.update(script_of(trainer)._steps)
    trainer = make_trainer(situation, folder)
    trainer.fit()
    trainer.close()
    own.update(script_of(trainer)._steps)
    model: Any = trainer.state.model
    return model, [join(own[number]) for number in range(situation.num_steps)]


def script_of(trainer: Trainer) -> Script:
    (script,) = (algorithm for algorithm in trainer.state.algorithms if isinstance(algorithm, Script))
    return script


def join(own: Any) -> Recorded:
    """A step of all ranks, from this rank's part."""
    parts: list[Any] = [own]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
    xs, ys, kept = zip(*parts, strict=True)
    return Recorded(torch.cat(xs), torch.cat(ys), torch.cat(kept, dim=1), [len(x) for x in xs])


def check(situation: Situation, folder: Path) -> str | None:
    """What is wrong with the end of a situation; None if it is as expected."""
    try:
        model, steps = train(situation, folder)
    except Stop:
        raise
    except Exception as error:
        if situation.may_be_refused_with is not None and situation.may_be_refused_with in str(error):
            return None
        return f"{situation}: {type(error).__name__}: {error}"
    expected = train_by_hand(situation, steps)
    if not situation.are_sums_in_another_order:
        return None if are_same(model, expected) else f"{situation}: off by {largest_difference(model, expected)}"
    difference = largest_difference(model, expected)
    return None if difference < 1e-6 else f"{situation}: off by {difference}"


def check_group(first: int, folder: Path) -> list[str]:
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    situations = [Situation(seed, num_ranks) for seed in range(first, first + GROUP)]
    errors = [check(situation, folder / f"{num_ranks} {situation.seed}") for situation in situations]
    return [error for error in errors if error is not None]


@pytest.mark.parametrize("first", SEEDS_ON_ONE_RANK[::GROUP])
def test_one_rank_trains_as_a_loop_written_by_hand(first: int, tmp_path: Path) -> None:
    errors = check_group(first, tmp_path)
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize("first", SEEDS_ON_TWO_RANKS[::GROUP])
def test_two_ranks_train_as_a_loop_written_by_hand(first: int, tmp_path: Path) -> None:
    for errors in run_on_ranks(2, check_group, timeout=300, first=first, folder=tmp_path):
        assert not errors, "\n".join(errors)
