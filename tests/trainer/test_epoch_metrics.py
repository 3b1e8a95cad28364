"""The mean loss and the training metrics of each epoch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from etude import Event, Trainer
from etude.algorithms import SAM, LabelSmoothing, MixUp
from etude.loggers import InMemoryLogger
from etude.models import ComposerModel
from etude.trainer import CheckpointSaver
from helpers.networks import vectors
from helpers.ranks import on_ranks
from helpers.recording import At


class Classifier(ComposerModel):
    """With an accuracy and a confusion matrix while training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(8, 3)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, batch: Any) -> Tensor:
        return self.layer(batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    def get_metrics(self, is_train: bool) -> dict[str, Any]:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        accuracy = MulticlassAccuracy(3, average="micro")
        return {"accuracy": accuracy, "matrix": MulticlassConfusionMatrix(3)} if is_train else {}

    def update_metric(self, batch: Any, outputs: Tensor, metric: Any) -> None:
        assert batch[1].dtype == torch.int64, "the targets are those of the data"
        self.seen.append((outputs.argmax(1), batch[1]))
        metric.update(outputs, batch[1])


def make_trainer(model: nn.Module | None = None, *, loggers: Any = (), **settings: Any) -> Trainer:
    model = Classifier() if model is None else model
    return Trainer(
        model,
        vectors(num_samples=22),
        max_duration="2ep",
        optimizers=SGD(model.parameters(), lr=0.5),
        loggers=loggers,
        device="cpu",
        progress_bar=False,
        **settings,
    )


def values(logger: InMemoryLogger, name: str) -> list[float]:
    return [float(value) for _, value in logger.data[name]]


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_they_are_those_of_all_samples_of_the_epoch(microbatch_size: int | None) -> None:
    logger, model = InMemoryLogger(), Classifier()
    trainer = make_trainer(
        model, loggers=logger, algorithms=LabelSmoothing(0.1), device_train_microbatch_size=microbatch_size
    )
    trainer.fit()
    losses = values(logger, "loss/train/total")
    samples = [4, 4, 4, 4, 4, 2]
    means = [sum(loss * count for loss, count in zip(losses[i : i + 6], samples, strict=True)) / 22 for i in (0, 6)]
    assert values(logger, "loss/train/epoch") == pytest.approx(means)
    assert [timestamp.batch for timestamp, _ in logger.data["loss/train/epoch"]] == [6, 12]
    rows = [torch.cat(column) for column in zip(*model.seen[::2], strict=True)]
    hits = (rows[0] == rows[1]).float()
    assert values(logger, "metrics/train/accuracy") == pytest.approx([float(hits[:22].mean()), float(hits[22:].mean())])
    assert trainer.state.train_metrics["metrics/train/accuracy"] == pytest.approx(float(hits[22:].mean()))
    matrix = trainer.state.train_metrics["metrics/train/matrix"]
    assert isinstance(matrix, Tensor) and int(matrix.sum()) == 22
    assert "metrics/train/matrix" not in logger.data
    trainer.close()


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("order", [1, -1])
def test_they_see_mixed_rows_of_the_first_pass_with_their_own_targets(order: int, microbatch_size: int | None) -> None:
    model = Classifier()
    whole = At(Event.BATCH_START, lambda state: state.batch[1])
    passes = At(Event.BEFORE_BACKWARD, lambda state: (state.microbatch_start, state.outputs.detach().argmax(1)))
    trainer = make_trainer(
        model,
        algorithms=[LabelSmoothing(), MixUp(2.0), SAM(rho=5.0)][::order],
        callbacks=[whole, passes],
        device_train_microbatch_size=microbatch_size,
    )
    trainer.fit()
    predictions, targets = (torch.cat(part) for part in zip(*model.seen[::2], strict=True))  # of the first metric
    assert torch.equal(targets, torch.cat(whole.answers))
    starts = [number for number, (start, _) in enumerate(passes.answers) if start == 0]
    assert len(starts) == 2 * len(whole.answers)
    by_pass = [
        torch.cat([outputs for _, outputs in passes.answers[first:last]])
        for first, last in zip(starts, [*starts[1:], None], strict=True)
    ]
    assert torch.equal(predictions, torch.cat(by_pass[::2]))
    assert not torch.equal(predictions, torch.cat(by_pass[1::2]))
    assert trainer.state.train_metrics["metrics/train/matrix"].sum() == 22  # type: ignore[union-attr]


@pytest.mark.parametrize("step", [3, 6, 8])
def test_an_epoch_that_is_resumed_in_its_middle_has_those_of_the_whole(step: int, tmp_path: Path) -> None:
    whole = InMemoryLogger()
    make_trainer(loggers=whole, callbacks=CheckpointSaver(tmp_path, "1ba", num_to_keep=-1)).fit()
    path = next(iter(sorted(tmp_path.glob(f"ep*-ba{step}.pt"))))
    resumed = InMemoryLogger()
    trainer = make_trainer(loggers=resumed, load_path=path)
    trainer.fit()
    for name in ("loss/train/epoch", "metrics/train/accuracy"):
        assert values(resumed, name) == values(whole, name)


class Counts:
    """A metric that is none of torchmetrics: its state is in no checkpoint."""

    def __init__(self) -> None:
        self.count = 0

    def to(self, device: Any) -> "Counts":
        return self

    def reset(self) -> None:
        self.count = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.count += len(targets)

    def compute(self) -> int:
        return self.count


class Shares(Classifier):
    """The same metric objects in training and in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = {"count": Counts()}

    def get_metrics(self, is_train: bool) -> dict[str, Any]:
        return self.metrics


def test_metrics_that_are_shared_with_the_evaluation_keep_their_samples() -> None:
    logger = InMemoryLogger()
    make_trainer(Shares(), loggers=logger, eval_dataloader=vectors(8), eval_interval="2ba").fit()
    assert values(logger, "metrics/train/count") == [22, 22]
    assert set(values(logger, "metrics/eval/count")) == {8}


def test_a_metric_without_a_state_is_not_logged_for_an_epoch_that_was_resumed_in_its_middle(tmp_path: Path) -> None:
    make_trainer(Shares(), callbacks=CheckpointSaver(tmp_path, "1ba", num_to_keep=-1)).fit()
    logger = InMemoryLogger()
    make_trainer(Shares(), loggers=logger, load_path=tmp_path / "ep0-ba3.pt").fit()
    assert values(logger, "metrics/train/count") == [22]


class Skips(Classifier):
    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        loss = super().loss(outputs, batch)
        self.count = getattr(self, "count", 0) + 1
        return loss * float("nan") if self.count == 2 else loss


def test_a_step_that_was_skipped_does_not_count() -> None:
    logger = InMemoryLogger()
    make_trainer(Skips(), loggers=logger, max_nonfinite_steps=1).fit()
    assert all(value > 0 for value in values(logger, "loss/train/epoch"))


@on_ranks(2)
def test_two_ranks_have_those_of_all_samples(tmp_path: Path) -> None:
    logger = InMemoryLogger()
    saver = CheckpointSaver(tmp_path, "1ba", num_to_keep=-1)
    trainer = make_trainer(loggers=logger, callbacks=saver, dist_timeout=60.0)
    trainer.fit()
    matrix = trainer.state.train_metrics["metrics/train/matrix"]
    assert isinstance(matrix, Tensor) and int(matrix.sum()) == 22
    again = make_trainer(load_path=tmp_path / "ep1-ba8.pt", dist_timeout=60.0)
    again.fit()
    found = again.state.train_metrics["metrics/train/matrix"]
    assert isinstance(found, Tensor) and torch.equal(found, matrix)
    if dist.get_rank() == 0:
        assert len(values(logger, "loss/train/epoch")) == 2
