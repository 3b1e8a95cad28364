"""The stages in which a Trainer is built."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from etude.engine import Algorithm, Callback, Event, State
from etude.trainer import Trainer, seed_all
from helpers.networks import LinearModel, tiny_resnet, vectors, weights


class AtInit(Algorithm):
    """Replaces a part of the state by a new one."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def match(self, event: Event, state: State) -> bool:
        return event is Event.INIT

    def apply(self, event: Event, state: State, logger: Any) -> None:
        setattr(state, self.name, self.value)


class Order(Callback):
    def __init__(self) -> None:
        self.events: list[str] = []

    def init(self, state: State, logger: Any) -> None:
        self.events.append("init")

    def before_load(self, state: State, logger: Any) -> None:
        self.events.append("before_load")

    def after_load(self, state: State, logger: Any) -> None:
        self.events.append("after_load")


def make_trainer(model: nn.Module | None = None, **settings: Any) -> Trainer:
    arguments = {"train_dataloader": vectors(), "max_duration": "1ep", "device": "cpu", "progress_bar": False}
    return Trainer(LinearModel() if model is None else model, **{**arguments, **settings})


def test_a_model_that_an_algorithm_puts_in_place_is_trained() -> None:
    model, other = LinearModel(), LinearModel()
    before = other.linear.weight.detach().clone()
    trainer = make_trainer(model, algorithms=AtInit("model", other))
    trainer.fit()
    assert trainer.state.model is other
    assert not torch.equal(other.linear.weight, before)


def test_an_optimizer_of_the_replaced_model_is_refused() -> None:
    model = LinearModel()
    with pytest.raises(ValueError, match="optimizers must hold parameters of the model only, SGD holds 2 of 2"):
        make_trainer(model, algorithms=AtInit("model", LinearModel()), optimizers=SGD(model.parameters(), lr=0.1))


def test_a_model_without_loss_that_an_algorithm_puts_in_place_is_refused() -> None:
    with pytest.raises(TypeError, match=r"state\.model must have a method loss"):
        make_trainer(algorithms=AtInit("model", nn.Linear(8, 3)))


@pytest.mark.parametrize("name", ["train_dataloader", "eval_dataloader"])
def test_data_that_an_algorithm_puts_in_place_is_read(name: str) -> None:
    trainer = make_trainer(eval_dataloader=vectors(), algorithms=AtInit(name, vectors(8)))
    trainer.fit()
    assert trainer.state.timestamp.batch == (2 if name == "train_dataloader" else 6)
    assert trainer.state.settings["train_dataloader"]["samples"] == (8 if name == "train_dataloader" else 24)


def test_events_come_in_order_whether_or_not_there_is_a_checkpoint() -> None:
    order = Order()
    make_trainer(callbacks=order)
    assert order.events == ["init", "before_load", "after_load"]


def test_a_model_without_parameters_is_refused() -> None:
    class Constant(nn.Module):
        def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
            return torch.zeros(())

    with pytest.raises(ValueError, match="model must have parameters to train, Constant has none"):
        make_trainer(Constant())


def test_a_change_of_the_working_directory_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Leave(Callback):
        def fit_start(self, state: State, logger: Any) -> None:
            (tmp_path / "elsewhere").mkdir()
            monkeypatch.chdir(tmp_path / "elsewhere")

    monkeypatch.chdir(tmp_path)
    make_trainer(callbacks=Leave(), save_folder="saved", run_name="mine").fit()
    assert {path.name for path in (tmp_path / "saved").glob("*.pt")} == {"ep0-ba0.pt", "ep1-ba6.pt"}
    assert (tmp_path / "runs" / "mine" / "metrics.jsonl").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_duration_or_data_alone_is_enough_until_fit() -> None:
    for given, missing in (("max_duration", "train_dataloader"), ("train_dataloader", "max_duration")):
        trainer = make_trainer(**{missing: None})
        assert getattr(trainer.state, given) is not None
        with pytest.raises(ValueError, match=f"{missing}.* must be given to fit"):
            trainer.fit()


class TestEvaluationOnly:
    def test_a_model_and_a_checkpoint_are_enough(self, tmp_path: Path) -> None:
        trained = make_trainer(save_folder=tmp_path)
        trained.fit()
        expected = trained.eval(vectors(20))
        trainer = Trainer(LinearModel(), load_path=tmp_path, device="cpu", progress_bar=False)
        assert trainer.eval(vectors(20)) == expected
        assert trainer.state.timestamp == trained.state.timestamp

    def test_algorithms_must_be_those_of_the_training(self, tmp_path: Path) -> None:
        from etude.algorithms import StochasticDepth
        from helpers.networks import images

        data = images()
        trained = make_trainer(
            tiny_resnet(), train_dataloader=data, algorithms=StochasticDepth(drop_rate=0.5), save_folder=tmp_path
        )
        trained.fit()
        expected = trained.eval(data)
        with pytest.raises(ValueError, match="algorithms"):
            Trainer(
                tiny_resnet(),
                algorithms=StochasticDepth(drop_rate=0.3),
                load_path=tmp_path,
                device="cpu",
                progress_bar=False,
            )
        again = Trainer(
            tiny_resnet(),
            algorithms=StochasticDepth(drop_rate=0.5),
            load_path=tmp_path,
            device="cpu",
            progress_bar=False,
        )
        assert again.eval(data) == expected

    def test_it_does_not_train_on(self, tmp_path: Path) -> None:
        make_trainer(save_folder=tmp_path).fit()
        trainer = Trainer(LinearModel(), load_path=tmp_path, device="cpu", progress_bar=False)
        with pytest.raises(ValueError, match="optimizers and train_dataloader must be given to the Trainer"):
            trainer.fit("1ep", vectors())


def test_a_seed_before_the_model_is_built_covers_its_initial_weights() -> None:
    def train() -> Tensor:
        seed_all(7)
        trainer = make_trainer(LinearModel(), seed=7)
        trainer.fit()
        return weights(trainer.state.model)

    assert torch.equal(train(), train())
    with pytest.raises(ValueError, match=r"seed must be an int in \[0, 2\*\*32\), got -1"):
        seed_all(-1)
