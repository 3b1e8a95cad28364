"""Evaluation sets and metrics."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from etude import Algorithm, Callback, Evaluator, Event, Logger, State, Trainer
from etude.callbacks import EarlyStopper
from etude.loggers import InMemoryLogger
from etude.trainer.checkpoint import CheckpointSaver
from helpers.networks import LinearModel, vectors


class Oracle(nn.Module):
    """Predicts the class that is the index of the largest of the first three inputs, or of the smallest."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(sign))
        self.metrics: dict[str, Metric] = {
            "accuracy": MulticlassAccuracy(3, average="micro"),
            "confusion": MulticlassConfusionMatrix(3),
            "of_classes": MulticlassAccuracy(3, average=None),
        }

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.sign * batch[0][:, :3]

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        return self.metrics  # the same objects each time, as Composer documents it

    def update_metric(self, batch: tuple[Tensor, Tensor], outputs: Tensor, metric: Metric) -> None:
        metric.update(outputs, batch[1])


def data(num_samples: int = 12, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of 4 that `Oracle` classifies without an error, and its negative never."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 3, (num_samples,), generator=generator)
    inputs = nn.functional.one_hot(targets, 8).float()
    return list(zip(inputs.split(4), targets.split(4), strict=True))


def make_trainer(model: nn.Module, eval_dataloader: Any, **settings: Any) -> Trainer:
    return Trainer(model, eval_dataloader=eval_dataloader, progress_bar=False, device="cpu", **settings)


class TestMetrics:
    def test_a_perfect_model_and_its_negative_with_the_same_metric_objects(self) -> None:
        model = Oracle()
        trainer = make_trainer(model, data())
        assert trainer.eval()["metrics/eval/accuracy"] == 1.0
        with torch.no_grad():
            model.sign.neg_()
        assert trainer.eval()["metrics/eval/accuracy"] == 0.0

    def test_tensor_results_are_returned_and_stored_but_not_logged(self) -> None:
        kept = InMemoryLogger()
        trainer = make_trainer(Oracle(), data(), loggers=kept)
        results = trainer.eval()
        counts = torch.bincount(torch.cat([targets for _, targets in data()]), minlength=3)
        torch.testing.assert_close(results["metrics/eval/confusion"], torch.diag(counts))
        assert set(trainer.state.eval_tensors) == {"metrics/eval/confusion", "metrics/eval/of_classes"}
        assert set(trainer.state.eval_metrics) == {"loss/eval/total", "metrics/eval/accuracy"} == set(kept.data)

    def test_results_that_are_dictionaries_and_tuples_are_logged_by_part(self) -> None:
        class Parts(LinearModel):
            def get_metrics(self, is_train: bool) -> dict[str, Any]:
                return {
                    "map": Fixed({"50": torch.tensor(0.5), "75": 0.25}),
                    "curve": Fixed((torch.ones(2), torch.ones(()))),
                }

            def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None: ...

        class Fixed:
            def __init__(self, value: Any) -> None:
                self.value = value

            def to(self, device: torch.device) -> "Fixed":
                return self

            def compute(self) -> Any:
                return self.value

        trainer = make_trainer(Parts(), vectors(8))
        trainer.eval()
        assert (
            trainer.state.eval_metrics.items()
            >= {
                "metrics/eval/map/50": 0.5,
                "metrics/eval/map/75": 0.25,
                "metrics/eval/curve/1": 1.0,
            }.items()
        )
        assert set(trainer.state.eval_tensors) == {"metrics/eval/curve/0"}

    def test_they_are_in_a_checkpoint(self, tmp_path: Path) -> None:
        def fit(**settings: Any) -> State:
            model = Oracle()
            optimizer = SGD(model.parameters(), lr=0.1)
            trainer = Trainer(
                model,
                data(),
                data(8, seed=1),
                "2ep",
                optimizers=optimizer,
                save_folder=tmp_path,
                progress_bar=False,
                device="cpu",
                **settings,
            )
            trainer.fit()
            trainer.close()
            return trainer.state

        first = fit()
        resumed = fit(autoresume=True)
        assert resumed.eval_metrics == first.eval_metrics
        assert resumed.eval_tensors.keys() == first.eval_tensors.keys()
        for name, value in first.eval_tensors.items():
            assert torch.equal(resumed.eval_tensors[name], value)

    def test_a_model_with_eval_forward_is_not_asked_for_a_loss(self) -> None:
        class Own(Oracle):
            def eval_forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
                return -self.forward(batch)

            def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
                raise AssertionError("called")

        results = make_trainer(Own(), data()).eval()
        assert results["metrics/eval/accuracy"] == 0.0
        assert "loss/eval/total" not in results


class TestSets:
    GOOD, BAD = data(seed=1), [(-inputs, targets) for inputs, targets in data(8, seed=2)]

    @pytest.mark.parametrize(
        "given",
        [
            {"good": GOOD, "bad": BAD},
            [Evaluator(label="good", dataloader=GOOD), Evaluator(label="bad", dataloader=BAD)],
        ],
    )
    def test_each_set_has_separate_results(self, given: Any) -> None:
        results = make_trainer(Oracle(), given).eval()
        assert results["metrics/good/accuracy"] == 1.0
        assert results["metrics/bad/accuracy"] == 0.0
        for label, batches in (("good", self.GOOD), ("bad", self.BAD)):
            alone = make_trainer(Oracle(), batches).eval()
            assert results[f"loss/{label}/total"] == alone["loss/eval/total"]

    def test_metrics_are_selected_by_name(self) -> None:
        evaluators = [
            Evaluator(label="a", dataloader=self.GOOD, metric_names=["acc.*", "confusion"]),
            Evaluator(label="b", dataloader=self.GOOD, metric_names=[]),
        ]
        results = make_trainer(Oracle(), evaluators).eval()
        assert set(results) == {"loss/a/total", "metrics/a/accuracy", "metrics/a/confusion", "loss/b/total"}

    def test_the_state_says_which_set_is_evaluated(self) -> None:
        seen: list[Any] = []

        class Watch(Callback):
            def eval_before_all(self, state: State, logger: Logger) -> None:
                seen.append(("before", state.dataloader_label, dict(state.eval_metrics)))

            def eval_start(self, state: State, logger: Logger) -> None:
                seen.append((state.dataloader_label, int(state.dataloader_len), state.eval_dataloader))  # type: ignore[arg-type]

            def eval_after_all(self, state: State, logger: Logger) -> None:
                seen.append(("after", state.dataloader_label, len(state.eval_metrics)))

        trainer = make_trainer(Oracle(), {"good": self.GOOD, "bad": self.BAD}, callbacks=Watch())
        trainer.eval()
        first, good, bad, last = seen
        assert first == ("before", None, {})
        assert (good[0], good[1], good[2] is self.GOOD) == ("good", 3, True)
        assert (bad[0], bad[1], bad[2] is self.BAD) == ("bad", 2, True)
        assert last == ("after", None, 4)
        assert trainer.state.eval_dataloader is self.GOOD

    def test_the_best_checkpoint_and_a_stopper_look_at_one_set(self, tmp_path: Path) -> None:
        model = Oracle()
        saver = CheckpointSaver(tmp_path, best="max:metrics/good/accuracy")
        trainer = Trainer(
            model,
            data(),
            {"bad": self.BAD, "good": self.GOOD},
            "5ep",
            optimizers=SGD(model.parameters(), lr=1e-6),
            callbacks=[saver, EarlyStopper("accuracy", "good", patience=1)],
            progress_bar=False,
            device="cpu",
        )
        trainer.fit()
        trainer.close()
        assert trainer.state.timestamp == "3ep"

    def test_an_algorithm_may_replace_the_data_of_the_only_set(self) -> None:
        class Replace(Algorithm):
            def match(self, event: Event, state: State) -> bool:
                return event is Event.INIT

            def apply(self, event: Event, state: State, logger: Logger) -> None:
                state.eval_dataloader = TestSets.BAD

        assert make_trainer(Oracle(), self.GOOD, algorithms=Replace()).eval()["metrics/eval/accuracy"] == 0.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Evaluator(label=3, dataloader=[]), TypeError, "label must be a name, got 3"),  # type: ignore[arg-type]
        (lambda: Evaluator(label="", dataloader=[]), ValueError, "label must be a name without"),
        (lambda: Evaluator(label="a/b", dataloader=[]), ValueError, "label must be a name without"),
        (lambda: Evaluator(label="train", dataloader=[]), ValueError, "label must be .* other than"),
        (lambda: Evaluator(label="predict", dataloader=[]), ValueError, "label must be .* other than"),
        (lambda: Evaluator(label="a", dataloader=[], metric_names="acc"), TypeError, "metric_names must be a list"),
        (lambda: make_trainer(Oracle(), {}), ValueError, "at least one dataloader, got an empty dictionary"),
        (lambda: make_trainer(Oracle(), {"a": 3}), TypeError, "eval_dataloader 'a' must be an iterable of batches"),
        (lambda: make_trainer(Oracle(), {"a": []}), ValueError, "eval_dataloader 'a' must yield at least one batch"),
        (lambda: make_trainer(Oracle(), [vectors(8)] * 2), TypeError, "must be one dataloader, got a list of several"),
        (
            lambda: make_trainer(Oracle(), [Evaluator(label="a", dataloader=data())] * 2),
            ValueError,
            "a different label for each dataloader, got 'a' twice",
        ),
        (
            lambda: make_trainer(Oracle(), Evaluator(label="a", dataloader=data(), metric_names=["f1"])),
            ValueError,
            "metric_names of 'a' must be among those of the model, accuracy, confusion, of_classes, got 'f1'",
        ),
    ],
)
def test_bad_evaluation_data_is_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
