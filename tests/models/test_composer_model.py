"""The base class of models: what it has by default, and what the Trainer makes of it."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from etude import Trainer
from etude.models import ComposerModel
from helpers.networks import vectors


class Classifier(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, batch: Any) -> Tensor:
        return self.layer(batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


class Logs(Classifier):
    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        if self.logger is not None:
            self.logger.log_metrics({"largest": outputs.abs().max()})
        return super().loss(outputs, batch)


class OwnForward(Classifier):
    def eval_forward(self, batch: Any, outputs: Any = None) -> Any:
        return {"logits": self.layer(batch[0])}


def make_trainer(model: nn.Module, **settings: Any) -> Trainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, vectors(), vectors(), "1ep", optimizers=optimizer, progress_bar=False, **settings)


def test_its_defaults_evaluate_the_loss_and_no_metrics() -> None:
    trainer = make_trainer(Classifier())
    trainer.fit()
    assert trainer.state.eval_metrics.keys() == {"loss/eval/total"}
    trainer.close()


def test_an_own_eval_forward_has_no_loss() -> None:
    trainer = make_trainer(OwnForward())
    trainer.fit()
    assert trainer.state.eval_metrics == {}
    assert trainer.state.outputs.keys() == {"logits"}
    trainer.close()


def test_eval_forward_takes_known_outputs() -> None:
    model, outputs = Classifier(), torch.ones(2)
    assert model.eval_forward(None, outputs) is outputs
    inputs = torch.randn(2, 8)
    assert torch.equal(model.eval_forward((inputs, None)), model.layer(inputs))


def test_it_has_the_logger_of_the_trainer_and_copies_have_none() -> None:
    model = Logs()
    assert model.logger is None
    trainer = make_trainer(model)
    assert model.logger is trainer.logger
    trainer.fit()
    trainer.close()
    assert copy.deepcopy(model).logger is None
    assert pickle.loads(pickle.dumps(model)).logger is None
    again = make_trainer(model)
    assert model.logger is again.logger
    again.close()


def test_a_logger_of_the_models_own_stays() -> None:
    model = Logs()
    model.logger = "its own"
    make_trainer(model).close()
    assert model.logger == "its own"


@pytest.mark.parametrize("method", ["forward", "loss", "update_metric"])
def test_methods_that_are_missing_are_named(method: str) -> None:
    arguments = {"forward": (1,), "loss": (1, 2), "update_metric": (1, 2, 3)}[method]
    with pytest.raises(NotImplementedError, match=rf"ComposerModel .*must have .*{method}\("):
        getattr(ComposerModel(), method)(*arguments)
