"""Changes that algorithms make to the state at INIT."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from etude import Algorithm, Event, State, Trainer
from helpers.networks import LinearModel, vectors


class AtInit(Algorithm):
    """Calls a function of the state at INIT."""

    def __init__(self, change: Callable[[State], None]) -> None:
        self.change = change

    def match(self, event: Event, state: State) -> bool:
        return event is Event.INIT

    def apply(self, event: Event, state: State, logger: Any) -> None:
        self.change(state)


def make_trainer(change: Callable[[State], None], *, has_optimizer: bool = True) -> Trainer:
    torch.manual_seed(0)
    model = LinearModel()
    return Trainer(
        model,
        vectors(),
        vectors(8),
        "1ep",
        AtInit(change),
        SGD(model.parameters(), lr=0.1) if has_optimizer else (),
        device="cpu",
        progress_bar=False,
    )


def test_a_replaced_model_trains() -> None:
    torch.manual_seed(1)
    other = LinearModel()
    before = other.linear.weight.detach().clone()

    def replace(state: State) -> None:
        state.model = other
        state.optimizers = [SGD(other.parameters(), lr=0.1)]

    trainer = make_trainer(replace)
    trainer.fit()
    assert trainer.state.model is other
    assert not torch.equal(before, other.linear.weight)
    trainer.close()


def test_a_replaced_model_gets_the_default_optimizer() -> None:
    other = LinearModel()
    trainer = make_trainer(lambda state: setattr(state, "model", other), has_optimizer=False)
    assert trainer.state.optimizers[0].param_groups[0]["params"] == list(other.parameters())
    trainer.close()


def test_a_replaced_model_with_the_optimizer_of_the_old_one_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizers must hold parameters of the model only"):
        make_trainer(lambda state: setattr(state, "model", LinearModel()))


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(TypeError, match="must have a method loss"):
        make_trainer(lambda state: setattr(state, "model", nn.Linear(8, 3)), has_optimizer=False)


def test_a_replaced_dataloader_is_read() -> None:
    trainer = make_trainer(lambda state: setattr(state, "train_dataloader", vectors(8)))
    trainer.fit()
    assert trainer.state.timestamp.sample == 8
    assert trainer.state.settings["train_dataloader"]["samples"] == 8
    trainer.close()


def test_a_replaced_eval_dataloader_is_read() -> None:
    trainer = make_trainer(lambda state: setattr(state, "eval_dataloader", None))
    trainer.fit()
    assert trainer.state.evaluated_at == -1
    trainer.close()


def test_a_dataloader_that_cannot_be_iterated_is_refused() -> None:
    with pytest.raises(TypeError, match="train_dataloader must be"):
        make_trainer(lambda state: setattr(state, "train_dataloader", 3))
