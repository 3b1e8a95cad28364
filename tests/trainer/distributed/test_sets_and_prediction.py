"""Evaluation sets, prediction and schedules on two ranks."""

import pytest
import torch
from torch.optim import SGD

from etude import Trainer
from etude.callbacks import EarlyStopper, LRMonitor, SpeedMonitor
from etude.optim import CosineAnnealingWithWarmupScheduler
from helpers.networks import LinearModel, images, tiny_resnet, vectors
from helpers.ranks import on_ranks, run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")


def predict() -> list[torch.Tensor]:
    torch.manual_seed(0)
    trainer = Trainer(tiny_resnet(), progress_bar=False, device="cpu")
    return trainer.predict(images(11, 4))


def evaluate() -> dict[str, object]:
    torch.manual_seed(0)
    data = {"a": images(11, 4), "b": images(6, 4)}
    return dict(Trainer(tiny_resnet(), eval_dataloader=data, progress_bar=False, device="cpu").eval())


def test_predictions_are_in_the_order_of_the_data() -> None:
    expected = torch.cat(predict())
    for outputs in run_on_ranks(2, predict):
        torch.testing.assert_close(torch.cat(outputs), expected)


def test_each_set_has_the_results_of_one_process() -> None:
    expected = evaluate()
    for results in run_on_ranks(2, evaluate):
        assert results == pytest.approx(expected, abs=1e-6)


@on_ranks(2)
def test_schedules_and_callbacks_run_on_every_rank() -> None:
    torch.manual_seed(0)
    model = LinearModel()
    trainer = Trainer(
        model,
        vectors(),
        vectors(8),
        "8ep",
        optimizers=SGD(model.parameters(), lr=0.0),
        schedulers=CosineAnnealingWithWarmupScheduler("1ep"),
        callbacks=[LRMonitor(), SpeedMonitor(), EarlyStopper("loss", patience=1)],
        progress_bar=False,
        device="cpu",
    )
    trainer.fit()
    trainer.close()
    assert trainer.state.timestamp == "3ep"
