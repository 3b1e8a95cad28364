"""Bad input is one error before the first step, and neither the model nor any file is touched."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.optim import SGD

from etude import Callback, Evaluator, Trainer
from etude.algorithms import EMA, StochasticDepth
from etude.callbacks import EarlyStopper
from etude.loggers import TensorboardLogger, WandBLogger
from etude.optim import LinearScheduler
from etude.trainer import CheckpointSaver
from helpers.networks import images, tiny_resnet
from helpers.resumable import differences


class Misspelt(Callback):
    def on_batch_end(self, state: Any, logger: Any) -> None: ...


CASES: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "a misspelt hook": (lambda: {"callbacks": Misspelt()}, TypeError, "did you mean batch_end"),
    "an unknown metric of an evaluator": (
        lambda: {"eval_dataloader": Evaluator(label="val", dataloader=images(), metric_names=["Acuracy"])},
        ValueError,
        "metric_names of 'val' must be among those of the model, MulticlassAccuracy, got 'Acuracy'",
    ),
    "an unknown monitor": (
        lambda: {"callbacks": EarlyStopper("Acuracy", "eval")},
        ValueError,
        "monitor must be one of loss, MulticlassAccuracy, got 'Acuracy'",
    ),
    "an unknown best metric": (
        lambda: {"callbacks": CheckpointSaver("saved", best="max:metrics/eval/Acuracy")},
        ValueError,
        "best must name one of the evaluation's metrics, loss/eval/total, metrics/eval/MulticlassAccuracy, got",
    ),
    "a drop schedule longer than the training": (
        lambda: {"algorithms": StochasticDepth(drop_rate=0.5, drop_warmup="3ep")},
        ValueError,
        "drop_warmup must not be longer than",
    ),
    "a learning rate schedule longer than the training": (
        lambda: {"schedulers": LinearScheduler(t_max="3ep")},
        ValueError,
        "t_max .*must not be longer than the training",
    ),
    "an address as save_folder": (lambda: {"save_folder": "s3://bucket/x"}, ValueError, "save_folder must be a plain"),
    "a pattern as save_folder": (lambda: {"save_folder": "{run_name}/x"}, ValueError, "save_folder must be a plain"),
    "two that exclude each other": (
        lambda: {"algorithms": [StochasticDepth(drop_rate=0.5), StochasticDepth(drop_rate=0.5)]},
        ValueError,
        "a run must have at most one StochasticDepth",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_one_error_before_the_first_step(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, error, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    model = tiny_resnet()
    before = copy.deepcopy(model.state_dict())
    settings: dict[str, Any] = {"eval_dataloader": images(), "max_duration": "1ep", "progress_bar": False, **make()}
    with pytest.raises(error, match=message):
        Trainer(model, images(), optimizers=SGD(model.parameters(), lr=0.1), **settings).fit()
    assert differences(dict(before), dict(model.state_dict())) == []
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("kind", [TensorboardLogger, WandBLogger])
def test_a_logger_without_its_package_is_refused(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'etude"):
        kind()


class Constant(nn.Module):
    def forward(self, batch: Any) -> Tensor:
        return batch[0]

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.mean()


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have parameters to train, Constant has none"):
        Trainer(Constant(), images(), max_duration="1ep", algorithms=EMA(), progress_bar=False)
