"""`Trainer.predict`."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from etude import Callback, Logger, State, Trainer
from etude.algorithms import StochasticDepth
from etude.models import ComposerClassifier
from helpers.networks import LinearModel, images, tiny_resnet, vectors


def make_trainer(model: nn.Module, **settings: Any) -> Trainer:
    return Trainer(model, progress_bar=False, device="cpu", **settings)


def test_the_outputs_are_those_of_the_model_in_evaluation_mode() -> None:
    model, data = tiny_resnet(), images(10, 4)
    outputs = make_trainer(model, algorithms=StochasticDepth(drop_rate=0.5)).predict(data)
    model.eval()
    with torch.no_grad():
        expected = [model(batch) for batch in data]
    assert [len(output) for output in outputs] == [4, 4, 2]
    for output, other in zip(outputs, expected, strict=True):
        assert torch.equal(output, other)
        assert not output.requires_grad


def test_the_model_and_the_state_are_as_before() -> None:
    model = tiny_resnet().train()
    model.module[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(model)
    trainer.predict(images())
    assert model.training
    assert not model.module[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (trainer.state.batch, trainer.state.dataloader_label) == (None, None)


def test_predicting_between_and_after_training_changes_nothing() -> None:
    def train(predicts: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = LinearModel()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(
            model, vectors(shuffle=True), max_duration="2ep", optimizers=optimizer, progress_bar=False, device="cpu"
        )
        if predicts:
            trainer.predict(vectors(8))
        trainer.fit()
        return [parameter.detach() for parameter in model.parameters()]

    assert all(map(torch.equal, train(True), train(False)))


class Pair(NamedTuple):
    logits: Tensor
    extra: dict[str, Any]


def test_outputs_may_be_containers() -> None:
    class Model(LinearModel):
        def forward(self, batch: Any) -> Any:
            logits = super().forward(batch)
            return Pair(logits, {"sum": logits.sum(1), "name": "x"})

    outputs = make_trainer(Model()).predict(vectors(8))
    assert isinstance(outputs[0], Pair)
    torch.testing.assert_close(outputs[1].extra["sum"], outputs[1].logits.sum(1))


@pytest.mark.parametrize("batched", [True, False])
def test_a_classifier_needs_no_targets(batched: bool) -> None:
    inputs = torch.randn(6, 8)
    model = ComposerClassifier(nn.Linear(8, 3), num_classes=3)
    data: Any = DataLoader(TensorDataset(inputs), 4) if batched else list(inputs.split(4))
    outputs = torch.cat(make_trainer(model).predict(data))
    torch.testing.assert_close(outputs, model.module(inputs).detach())


def test_callbacks_see_what_is_predicted() -> None:
    seen: list[Any] = []

    class Watch(Callback):
        def predict_batch_end(self, state: State, logger: Logger) -> None:
            seen.append((state.dataloader_label, state.batch_num_samples, tuple(state.outputs.shape)))

    make_trainer(LinearModel(), callbacks=Watch()).predict(vectors(6))
    assert seen == [("predict", 4, (4, 3)), ("predict", 2, (2, 3))]


class TestRefused:
    @pytest.mark.parametrize(
        ("data", "error", "message"),
        [
            (3, TypeError, "dataloader must be an iterable of batches, got 3"),
            ([], ValueError, "dataloader must yield at least one batch, its length is 0"),
            (DataLoader([], 4), ValueError, "dataloader must yield at least one batch"),  # type: ignore[arg-type]
        ],
    )
    def test_bad_data(self, data: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            make_trainer(LinearModel()).predict(data)

    def test_a_closed_trainer(self) -> None:
        trainer = make_trainer(LinearModel())
        trainer.close()
        with pytest.raises(RuntimeError, match="cannot predict any more"):
            trainer.predict(vectors())
