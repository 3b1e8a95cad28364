"""Randomly generated training setups compared with a plain PyTorch loop.

Each is drawn from a seed: model, container of the batch, sampler or stream, workers, optimizer, schedule, microbatches,
drops by the class or the functional form, layers that are unfrozen, replaced or added, gradients that are edited,
averaged weights, a loss that runs the model again, rows that are NaN, and a stop from which it is resumed.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import etude.functional as cf
from etude import Algorithm, Callback, Event, Trainer
from etude.algorithms import EMA, LabelSmoothing, StochasticDepth
from helpers.hand_written import (
    Recorded,
    are_same,
    edit_after_backward,
    edit_before_update,
    largest_difference,
    train_by_hand,
)
from helpers.ranks import run_on_ranks
from helpers.situations import Network, Situation, add_layer, inputs_and_targets, replace_head

pytestmark = pytest.mark.slow

SEEDS_ON_ONE_RANK = range(200)
SEEDS_ON_TWO_RANKS = range(100)
SEEDS_PER_TEST = 20  # on one rank; on two all share one process group


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

    def __init__(self, situation: Situation) -> None:
        self._situation = situation
        self._steps: dict[int, Any] = {}

    def match(self, event: Event, state: Any) -> bool:
        return event in (Event.INIT, Event.BATCH_START, Event.AFTER_BACKWARD, Event.AFTER_TRAIN_BATCH)

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        number = int(state.timestamp.batch)
        if event is Event.INIT and self._situation.replaces_head:
            replace_head(state.model, state.optimizers[0])
        elif event is Event.BATCH_START:
            if self._situation.grow_at == number:
                add_layer(state.model, state.optimizers[0])
            if self._situation.unfreeze_at is not None:
                state.model.stem.requires_grad_(number >= self._situation.unfreeze_at)
            x, y = inputs_and_targets(state.batch)
            self._steps[number] = (x.clone(), y.clone(), kept_rows(state.model, len(x)))
        elif event is Event.AFTER_BACKWARD:
            edit_after_backward(state.model, self._situation)
        elif event is Event.AFTER_TRAIN_BATCH:
            edit_before_update(state.model, self._situation, number)


def kept_rows(model: Any, num_rows: int) -> Tensor:
    """Which block computes which row in this step."""
    if not (blocks := cf.stochastic_blocks(model)):
        return torch.ones(len(model.blocks), num_rows, dtype=torch.bool)
    dropped = torch.from_numpy(blocks[0].drop_plan.decisions)
    return ~(dropped if dropped.dim() == 2 else dropped[:, None].expand(-1, num_rows))


def make_trainer(situation: Situation, folder: Path, *callbacks: Callback) -> Trainer:
    model = situation.make_model()
    optimizer, scheduler = situation.make_optimizer(model)
    algorithms: list[Algorithm] = []
    if situation.method is not None:
        settings: dict[str, Any] = {
            "stochastic_method": situation.method,
            "drop_rate": situation.drop_rate,
            "use_same_gpu_seed": situation.use_same_gpu_seed,
            "draws": situation.draws,
            "scaling": situation.scaling,
        }
        if situation.is_functional:
            cf.apply_stochastic_depth(model, **settings)
        else:
            algorithms.append(StochasticDepth(**settings))
    if situation.smoothing is not None:
        algorithms.append(LabelSmoothing(situation.smoothing))
    algorithms.append(Script(situation))
    if situation.ema is not None:
        algorithms.append(EMA(half_life=None, smoothing=situation.ema))
    return Trainer(
        model,
        situation.make_dataloader(model),
        None,
        f"{situation.num_steps}ba",
        algorithms=algorithms,
        optimizers=optimizer,
        schedulers=[] if scheduler is None else [scheduler],
        step_schedulers_every_batch=True,
        device_train_microbatch_size=situation.microbatch_size,
        max_nonfinite_steps=situation.max_nonfinite_steps,
        seed=situation.seed,
        save_folder=folder,
        save_interval="1ba",
        autoresume=True,
        callbacks=callbacks,
        progress_bar=False,
        dist_timeout=60.0,
    )


def train(situation: Situation, folder: Path) -> tuple[Network, dict[str, Tensor], list[Recorded]]:
    """Train with the Trainer, in two parts if the situation stops.

    Returns:
        The model, the averages of its weights, and the steps of all ranks.
    """
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
    averages: dict[str, Tensor] = {}
    for algorithm in trainer.state.algorithms:
        if isinstance(algorithm, EMA):
            averages = dict(algorithm.get_ema_model(copy.deepcopy(model)).state_dict())
    return model, averages, [join(own[number]) for number in range(situation.num_steps)]


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
        model, averages, steps = train(situation, folder)
    except Stop:
        raise
    except Exception as error:
        if any(reason in str(error) for reason in situation.may_be_refused_with):
            return None
        return f"{situation}: {type(error).__name__}: {error}"
    expected, expected_averages = train_by_hand(situation, steps)
    if off := [name for name, value in expected_averages.items() if (averages[name] - value).abs().max() > 1e-9]:
        return f"{situation}: the average of {off[0]} is off"
    if not situation.are_sums_in_another_order:
        return None if are_same(model, expected) else f"{situation}: off by {largest_difference(model, expected)}"
    difference = largest_difference(model, expected)
    return None if difference < 1e-6 else f"{situation}: off by {difference}"


def check_all(seeds: range, folder: Path) -> list[str]:
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    situations = [Situation(seed, num_ranks) for seed in seeds]
    errors = [check(situation, folder / f"{num_ranks} {situation.seed}") for situation in situations]
    return [error for error in errors if error is not None]


@pytest.mark.parametrize("first", SEEDS_ON_ONE_RANK[::SEEDS_PER_TEST])
def test_one_rank_trains_as_a_loop_written_by_hand(first: int, tmp_path: Path) -> None:
    errors = check_all(range(first, first + SEEDS_PER_TEST), tmp_path)
    assert not errors, "\n".join(errors)


def test_two_ranks_train_as_a_loop_written_by_hand(tmp_path: Path) -> None:
    for errors in run_on_ranks(2, check_all, timeout=900, seeds=SEEDS_ON_TWO_RANKS, folder=tmp_path):
        assert not errors, "\n".join(errors)
