"""Losses and gradients that are not finite on one of two ranks."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from etude import Algorithm, Event, Trainer
from etude.trainer import CheckpointSaver, TrainingInterrupted
from helpers.networks import vectors
from helpers.parallel_training import OnOneRank, assert_same_on_all_ranks
from helpers.ranks import on_ranks
from helpers.resumable import differences, fit

OPTIMIZERS = ["SGD", "fused SGD", "fused AdamW"]


class NormModel(nn.Module):
    """With running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, batch: Any) -> Tensor:
        return self.linear(self.norm(batch[0]))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


def make_optimizer(name: str, model: nn.Module) -> Optimizer:
    if name == "fused AdamW":
        return AdamW(model.parameters(), lr=0.05, fused=True)
    return SGD(model.parameters(), lr=0.1, momentum=0.9, fused=name == "fused SGD")


def make_trainer(optimizer: str, *algorithms: Algorithm, model: nn.Module | None = None, **settings: Any) -> Trainer:
    model = NormModel() if model is None else model
    settings = {"max_duration": "8ba", "progress_bar": False, "device": "cpu", **settings}
    return Trainer(
        model, vectors(), None, algorithms=algorithms, optimizers=make_optimizer(optimizer, model), **settings
    )


def spoil_loss(state: Any) -> None:
    state.loss = state.loss * float("nan")


def spoil_gradient(state: Any) -> None:
    state.outputs.register_hook(lambda gradient: gradient * float("inf"))


SPOILS = {"loss": (Event.AFTER_LOSS, spoil_loss), "gradient": (Event.AFTER_FORWARD, spoil_gradient)}


def spoil(what: str, step: int) -> OnOneRank:
    event, action = SPOILS[what]
    return OnOneRank(event, step, action)


def terminate(state: Any) -> None:
    if not terminated:
        terminated.append(True)
        os.kill(os.getpid(), signal.SIGTERM)


terminated: list[bool] = []


def without_buffers(result: dict[str, Any]) -> dict[str, Any]:
    """A resume gives all ranks the running statistics of rank 0."""
    model = {name: tensor for name, tensor in result["model"].items() if "running" not in name}
    return {**result, "model": model}


class Keep(Algorithm):
    """Keeps weights and buffers at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.kept: dict[str, Tensor] = {}

    def match(self, event: Event, state: Any) -> bool:
        return event is Event.BATCH_START and state.timestamp.batch == self.step

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        self.kept = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


@on_ranks(2)
@pytest.mark.parametrize("what", SPOILS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("step", [0, 3])
def test_all_ranks_stop_with_what_they_had_before_the_step(what: str, optimizer: str, step: int) -> None:
    keep = Keep(step)
    trainer = make_trainer(optimizer, keep, spoil(what, step))
    message = f"the loss of step {step} is nan" if what == "loss" else f"the gradients of step {step} are not finite"
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit()
    assert differences(keep.kept, dict(trainer.state.model.state_dict())) == []
    assert len(trainer.state.optimizers[0].state) == (2 + 2 if step else 0)
    assert trainer.state.timestamp.batch == step
    assert_same_on_all_ranks(trainer.state.model)


@on_ranks(2)
@pytest.mark.parametrize("what", SPOILS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_ranks_skip_the_step_and_resume_right_after_it(what: str, optimizer: str, tmp_path: Path) -> None:
    def trainer(**settings: Any) -> Trainer:
        return make_trainer(optimizer, spoil(what, 3), max_nonfinite_steps=1, **settings)

    expected = fit(trainer(callbacks=CheckpointSaver(tmp_path, "1ba", num_to_keep=-1)))
    assert all(tensor.isfinite().all() for tensor in expected["model"].values())
    for name in ("ep0-ba3.pt", "ep0-ba4.pt", "ep0-ba5.pt"):
        found = fit(trainer(load_path=tmp_path / name))
        assert differences(without_buffers(expected), without_buffers(found)) == [], name


@on_ranks(2)
@pytest.mark.parametrize("what", SPOILS)
@pytest.mark.parametrize("optimizer", ["SGD", "fused SGD"])
def test_no_rank_saves_after_the_step(what: str, optimizer: str, tmp_path: Path) -> None:
    trainer = make_trainer(optimizer, spoil(what, 3), save_folder=tmp_path, save_interval="1ba")
    with pytest.raises(FloatingPointError):
        trainer.fit()
    assert (tmp_path / "latest").read_text() == "ep0-ba3.pt\n"


@on_ranks(2)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sigterm_on_one_rank_stops_both_after_the_same_step(optimizer: str, tmp_path: Path) -> None:
    expected = fit(make_trainer(optimizer, OnOneRank(Event.BEFORE_FORWARD, 99, terminate)))
    stop = OnOneRank(Event.BEFORE_FORWARD, 3, terminate)
    trainer = make_trainer(optimizer, stop, save_folder=tmp_path)
    with pytest.raises(TrainingInterrupted) as caught:
        trainer.fit()
    assert caught.value.code == 143
    # With a fused optimizer the other rank learns of it a step later.
    last = 4 if optimizer == "SGD" else 5
    assert trainer.state.timestamp.batch == last
    assert (tmp_path / "latest").read_text() == f"ep0-ba{last}.pt\n"
    resumed = make_trainer(optimizer, stop, save_folder=tmp_path, autoresume=True)
    assert differences(without_buffers(expected), without_buffers(fit(resumed))) == []
