"""Resuming with changed functions and fields among the settings."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LRScheduler, SequentialLR
from torch.utils.data import DataLoader, WeightedRandomSampler

from etude import Algorithm, Event, State, Trainer
from etude.algorithms import LabelSmoothing
from etude.trainer import settings as run_settings
from etude.trainer.options import MAY_CHANGE
from helpers.networks import LinearModel, vectors


class Weighted(Algorithm):
    """Multiplies the loss by a function of the elapsed fraction of the training."""

    def __init__(self, weight: Any = 1.0) -> None:
        self.weight = weight

    def match(self, event: Event, state: State) -> bool:
        return event is Event.AFTER_LOSS

    def apply(self, event: Event, state: State, logger: Any) -> None:
        assert state.loss is not None
        state.loss = state.loss * (self.weight(0.5) if callable(self.weight) else 1.0)


def power(exponent: float) -> Callable[[float], float]:
    return lambda time: time**exponent


def steep(epoch: int) -> float:
    return 0.5**epoch


def collate(pairs: Any, scale: float = 1.0) -> Any:
    return torch.stack([scale * x for x, _ in pairs]), torch.stack([y for _, y in pairs])


def trainer(
    weight: Any = 1.0,
    make_scheduler: Callable[[SGD], LRScheduler] = ConstantLR,
    algorithms: Any = None,
    **loader: Any,
) -> Trainer:
    torch.manual_seed(0)
    model = LinearModel()
    optimizer = SGD(model.parameters(), lr=0.1)
    return Trainer(
        model,
        DataLoader(vectors().dataset, batch_size=4, **loader),
        None,
        "1ep",
        Weighted(weight) if algorithms is None else algorithms,
        optimizer,
        make_scheduler(optimizer),
        device="cpu",
        progress_bar=False,
        save_folder="saved",
        autoresume=True,
    )


def sequence(function: Callable[[int], float]) -> Callable[[SGD], LRScheduler]:
    return lambda optimizer: SequentialLR(optimizer, [ConstantLR(optimizer), LambdaLR(optimizer, function)], [2])


def weighted(*weights: float) -> WeightedRandomSampler:
    return WeightedRandomSampler([*weights, *[1.0] * (24 - len(weights))], 24)


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a lambda": ({"weight": lambda t: t}, {"weight": lambda t: t * t}, "algorithms.0.weight.code: '3."),
    "a closure": ({"weight": power(2.0)}, {"weight": power(3.0)}, "algorithms.0.weight.closure.exponent: 2.0 -> 3.0"),
    "a partial": (
        {"weight": partial(pow, 2)},
        {"weight": partial(pow, 3)},
        "algorithms.0.weight.args.0: 2 -> 3",
    ),
    "a field of a dataclass": (
        {"algorithms": [Weighted(), LabelSmoothing(0.1)]},
        {"algorithms": [Weighted(), LabelSmoothing(0.2)]},
        "algorithms.1.smoothing: 0.1 -> 0.2",
    ),
    "the order of algorithms": (
        {"algorithms": [Weighted(), LabelSmoothing(0.1)]},
        {"algorithms": [LabelSmoothing(0.1), Weighted()]},
        "algorithms.0: Weighted(weight=1.0) -> LabelSmoothing(smoothing=0.1, target_key=1)",
    ),
    "the function of a LambdaLR": (
        {"make_scheduler": lambda optimizer: LambdaLR(optimizer, lambda epoch: 0.5**epoch)},
        {"make_scheduler": lambda optimizer: LambdaLR(optimizer, lambda epoch: 0.9**epoch)},
        "schedulers.0.lr_lambdas.0.code: ",
    ),
    "the function of a LambdaLR in a SequentialLR": (
        {"make_scheduler": sequence(steep)},
        {"make_scheduler": sequence(lambda epoch: 0.9**epoch)},
        "schedulers.0.schedulers.1.lr_lambdas.0.function: ",
    ),
    "a schedule that is a function of the state": (
        {"make_scheduler": lambda optimizer: lambda state: 0.5},
        {"make_scheduler": lambda optimizer: lambda state: 0.25},
        "schedulers.0.code: ",
    ),
    "the collate_fn": (
        {"collate_fn": partial(collate, scale=1.0)},
        {"collate_fn": partial(collate, scale=2.0)},
        "train_dataloader.collate_fn.keywords.scale: 1.0 -> 2.0",
    ),
    "the weights of a sampler": (
        {"sampler": weighted(1.0)},
        {"sampler": weighted(2.0)},
        "train_dataloader.sampler.weights.0: 1.0 -> 2.0",
    ),
    "drop_last": ({"drop_last": True}, {}, "train_dataloader.drop_last: True -> False"),
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(settings: dict[str, Any]) -> None:
    made = trainer(**settings)
    made.fit()
    made.close()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_by_name_and_the_same_program_is_not(name: str, caplog: pytest.LogCaptureFixture) -> None:
    before, after, message = CHANGES[name]
    run(before)
    trainer(**before).close()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    with pytest.raises(ValueError, match="the settings must be those of the run that is resumed") as caught:
        trainer(**after)
    assert message in str(caught.value)
    assert "0x" not in str(caught.value)


def test_functions_are_not_compared_between_versions_of_python(caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(weight=lambda t: t)
    own = made.state.settings
    made.close()
    saved = {**own, "python": "3.10"}
    saved["algorithms"] = [{"class": "Weighted", "weight": {**own["algorithms"][0]["weight"], "code": "3.10:abc"}}]
    run_settings.check_same_training(saved, own, MAY_CHANGE)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert messages[0].startswith("resuming with other settings: python: '3.10' -> '3.")
    assert messages[1] == "the code of functions among the settings is not compared between versions of Python"
    saved["algorithms"][0]["weight"]["function"] = "other"
    with pytest.raises(ValueError, match=r"algorithms\.0\.weight\.function: 'other' -> "):
        run_settings.check_same_training(saved, own, MAY_CHANGE)


def test_settings_that_cannot_be_compared_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    run({"algorithms": [LabelSmoothing(), Weighted(nn.Identity()), Weighted(object())]})
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert messages == [
        "a resume cannot tell whether these settings have changed: algorithms.1.weight (Identity), "
        "algorithms.2.weight (object)"
    ]


def test_a_long_setting_is_shortened_in_the_message() -> None:
    made = trainer()
    with pytest.raises(ValueError) as caught:
        run_settings.check_same_training(
            {**made.state.settings, "seed": ["x" * 10**5]}, made.state.settings, MAY_CHANGE
        )
    made.close()
    assert len(str(caught.value)) < 1000
