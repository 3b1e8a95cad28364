"""EarlyStopper and ThresholdStopper."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from etude import Callback, Logger, State, Time, Trainer
from etude.callbacks import EarlyStopper, ThresholdStopper
from etude.loggers import InMemoryLogger
from helpers.networks import LinearModel, vectors

BATCHES = 6  # per epoch


class Scripted:
    """A metric whose value is the next of a list, by the epochs that the model has trained."""

    def __init__(self, model: "ScriptedModel") -> None:
        self.model = model

    def to(self, device: torch.device) -> "Scripted":
        return self

    def reset(self) -> None: ...

    def compute(self) -> float:
        return self.model.script[int(self.model.num_batches) // BATCHES - 1]


class ScriptedModel(LinearModel):
    num_batches: Tensor

    def __init__(self, script: Sequence[float]) -> None:
        super().__init__()
        self.script = script
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.training:
            self.num_batches += 1
        return super().forward(batch)

    def get_metrics(self, is_train: bool) -> dict[str, Scripted]:
        return {} if is_train else {"score": Scripted(self)}

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None: ...


class Watch(Callback):
    def __init__(self) -> None:
        self.events: list[str] = []

    def eval_end(self, state: State, logger: Logger) -> None:
        self.events.append("eval")

    def fit_end(self, state: State, logger: Logger) -> None:
        self.events.append("end")


class Crash(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def batch_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == self.batch:
            raise KeyboardInterrupt


def make_trainer(script: Sequence[float], *callbacks: Callback, max_duration: str = "8ep", **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = ScriptedModel(script)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(
        model,
        vectors(),
        vectors(8),
        max_duration,
        optimizers=optimizer,
        callbacks=callbacks,
        progress_bar=False,
        **settings,
    )


def epochs_trained(script: Sequence[float], callback: Callback) -> int:
    trainer = make_trainer(script, callback)
    trainer.fit()
    trainer.close()
    return int(trainer.state.timestamp.epoch)


class TestEarlyStopper:
    @pytest.mark.parametrize(
        ("script", "settings", "epochs"),
        [
            ([1, 2, 3, 4, 5, 6, 7, 8], {}, 8),  # improves all the time
            ([1, 2, 2, 2, 2, 2, 2, 2], {}, 4),  # the best is of epoch 2: one epoch more is patience, the next too long
            ([1, 2, 2, 2, 2, 2, 2, 2], {"patience": 0}, 3),
            ([1, 2, 2, 2, 2, 2, 2, 2], {"patience": "3ep"}, 6),
            ([1, 2, 2, 2, 2, 2, 2, 2], {"patience": Time.from_batch(2 * BATCHES)}, 5),
            ([1, 2, 2, 3, 3, 3, 3, 3], {}, 6),  # an improvement in time
            ([1, 2, 2.4, 2.8, 3.2, 3.2, 3.2, 3.2], {"min_delta": 0.5, "patience": 2}, 7),
            ([3, 2, 1, 1, 1, 1, 1, 1], {"comp": "less"}, 5),
            ([3, 2, 1, 1, 1, 1, 1, 1], {"comp": torch.less}, 5),
            ([3, 2, 1, 1, 1, 1, 1, 1], {"comp": lambda value, best: value < best}, 5),
            ([3, 2, 1, 1, 1, 1, 1, 1], {"comp": "gt"}, 3),
            ([math.nan, 1, 1, 1, 1, 1, 1, 1], {}, 4),  # NaN is no best value
            ([1, math.nan, math.nan, 2, 3, 4, 5, 6], {}, 3),
        ],
    )
    def test_training_ends_when_the_metric_has_not_improved_for_longer_than_patience(
        self, script: Sequence[float], settings: dict[str, Any], epochs: int
    ) -> None:
        assert epochs_trained(script, EarlyStopper("score", **settings)) == epochs

    def test_a_loss_improves_downwards_by_default(self) -> None:
        assert EarlyStopper("loss").comp is EarlyStopper("Perplexity").comp is torch.less
        assert EarlyStopper("accuracy").comp is torch.greater

    def test_the_end_is_evaluated_once_and_announced(self) -> None:
        watch = Watch()
        trainer = make_trainer([2, 1, 1, 1, 1, 1, 1, 1], EarlyStopper("score"), watch, eval_interval="3ba")
        trainer.fit()
        trainer.close()
        assert trainer.state.timestamp == "15ba"  # the first 3 batches after more than one epoch without improvement
        assert trainer.state.is_stopped
        assert watch.events == ["eval"] * 5 + ["end"]

    @pytest.mark.parametrize("stop_at", [4, 12, 14, 18, 20])
    def test_a_resumed_run_stops_at_the_same_step_as_an_uninterrupted_one(self, tmp_path: Path, stop_at: int) -> None:
        script = [1, 2, 2, 2, 2, 2, 2, 2]
        unbroken = make_trainer(script, EarlyStopper("score"))
        unbroken.fit()
        unbroken.close()
        first = make_trainer(script, EarlyStopper("score"), Crash(stop_at), save_folder=tmp_path, save_interval="1ba")
        with pytest.raises(KeyboardInterrupt):
            first.fit()
        resumed = make_trainer(
            script, EarlyStopper("score"), save_folder=tmp_path, save_interval="1ba", autoresume=True
        )
        assert resumed.state.timestamp == f"{stop_at}ba"
        resumed.fit()
        resumed.close()
        assert resumed.state.timestamp == unbroken.state.timestamp
        assert resumed.state.eval_metrics == unbroken.state.eval_metrics
        for name, tensor in unbroken.state.model.state_dict().items():
            assert torch.equal(tensor, resumed.state.model.state_dict()[name])

    def test_a_stopped_run_does_not_train_on_when_it_is_resumed(self, tmp_path: Path) -> None:
        script = [1, 1, 1, 1, 1, 1, 1, 1]
        first = make_trainer(script, EarlyStopper("score", patience=0), save_folder=tmp_path)
        first.fit()
        first.close()
        resumed = make_trainer(script, EarlyStopper("score", patience=0), save_folder=tmp_path, autoresume=True)
        resumed.fit()
        resumed.close()
        assert resumed.state.timestamp == first.state.timestamp == "2ep"


class TestThresholdStopper:
    @pytest.mark.parametrize(
        ("script", "settings", "epochs"),
        [
            ([1, 2, 3, 4, 5, 6, 7, 8], {"threshold": 4.5}, 5),
            ([1, 2, 3, 4, 5, 6, 7, 8], {"threshold": 9}, 8),
            ([8, 7, 6, 5, 4, 3, 2, 1], {"threshold": 5.5, "comp": "lt"}, 4),
            ([8, 7, 6, 5, 4, 3, 2, 1], {"threshold": 5, "comp": lambda value, threshold: value <= threshold}, 4),
        ],
    )
    def test_training_ends_when_the_metric_is_better_than_the_threshold(
        self, script: Sequence[float], settings: dict[str, Any], epochs: int
    ) -> None:
        assert epochs_trained(script, ThresholdStopper("score", "eval", **settings)) == epochs

    def test_the_loss_can_be_monitored(self) -> None:
        assert epochs_trained([0.0] * 8, ThresholdStopper("loss", "eval", 1e9)) == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EarlyStopper(""), TypeError, "monitor must be a name, got ''"),
        (lambda: EarlyStopper("score", None), TypeError, "dataloader_label must be a name, got None"),  # type: ignore[arg-type]
        (lambda: EarlyStopper("score", comp="max"), ValueError, "comp must be a function or one of less, lt, greater"),
        (lambda: EarlyStopper("score", min_delta=-1), ValueError, "min_delta must be a finite number >= 0"),
        (lambda: EarlyStopper("score", patience="10min"), ValueError, 'patience must be .* "ep" or "ba", got "10min"'),
        (lambda: EarlyStopper("score", patience=-1), ValueError, 'patience must be .* got "-1ep"'),
        (lambda: EarlyStopper("score", patience=0.5), TypeError, "patience must be a Time or a time string"),  # type: ignore[arg-type]
        (lambda: ThresholdStopper("score", "eval", math.nan), ValueError, "threshold must be a finite number"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("stopper", "message"),
    [
        (EarlyStopper("accuracy"), "monitor must be one of loss, score, got 'accuracy'"),
        (ThresholdStopper("score", "validation", 1.0), "dataloader_label must be .*, got 'validation'"),
    ],
)
def test_an_unknown_metric_is_refused_before_the_first_step(stopper: Callback, message: str) -> None:
    trainer = make_trainer([1] * 8, stopper)
    with pytest.raises(ValueError, match=message):
        trainer.fit()
    assert trainer.state.timestamp == "0ba"


class TestTraining:
    """Stoppers that look at the training itself."""

    def make_trainer(self, *callbacks: Callback, loggers: Any = ()) -> Trainer:
        torch.manual_seed(0)
        model = LinearModel()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        settings: Any = {"optimizers": optimizer, "callbacks": callbacks, "loggers": loggers}
        return Trainer(model, vectors(), max_duration="4ep", progress_bar=False, **settings)

    def test_the_mean_loss_of_an_epoch(self) -> None:
        logger = InMemoryLogger()
        reference = self.make_trainer(loggers=logger)
        reference.fit()
        losses = [float(value) for _, value in logger.data["loss/train/epoch"]]
        assert losses[2] < losses[1] < losses[0]
        trainer = self.make_trainer(ThresholdStopper("loss", "train", (losses[0] + losses[1]) / 2))
        trainer.fit()
        assert trainer.state.timestamp == "2ep"

    def test_the_loss_of_a_batch(self) -> None:
        logger = InMemoryLogger()
        self.make_trainer(loggers=logger).fit()
        losses = [float(value) for _, value in logger.data["loss/train/total"]]
        smallest = min(losses[:8])
        trainer = self.make_trainer(ThresholdStopper("loss", "train", smallest + 1e-6, stop_on_batch=True))
        trainer.fit()
        assert trainer.state.timestamp.batch == losses.index(smallest) + 1

    def test_metrics_that_there_are_not(self) -> None:
        with pytest.raises(ValueError, match="monitor must be one of loss, got 'accuracy'"):
            self.make_trainer(EarlyStopper("accuracy", "train")).fit()
        with pytest.raises(
            ValueError, match='stop_on_batch must be False for other metrics than the "loss" of "train"'
        ):
            ThresholdStopper("loss", "eval", 1.0, stop_on_batch=True)


def test_a_run_without_evaluation_is_refused() -> None:
    trainer = Trainer(LinearModel(), vectors(), None, "1ep", callbacks=EarlyStopper("loss"), progress_bar=False)
    with pytest.raises(ValueError, match="EarlyStopper needs an eval_dataloader"):
        trainer.fit()


def test_the_state_of_a_callback_may_hold_counters_of_the_timestamp(tmp_path: Path) -> None:
    class Remember(Callback):
        def __init__(self) -> None:
            self.seen: dict[str, Any] = {}

        def batch_end(self, state: State, logger: Logger) -> None:
            self.seen = {"batch": state.timestamp.batch, "all": [state.timestamp.epoch, (state.timestamp.sample,)]}

        def state_dict(self) -> dict[str, Any]:
            return self.seen

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = state

    def run(callback: Remember, max_duration: str, **settings: Any) -> None:
        trainer = make_trainer([1] * 8, callback, max_duration=max_duration, save_folder=tmp_path, **settings)
        if not settings:
            trainer.fit()
        trainer.close()

    first, resumed = Remember(), Remember()
    run(first, "8ba")
    run(resumed, "9ba", autoresume=True)
    assert resumed.seen == first.seen == {"batch": 8, "all": [1, (32,)]}
    assert type(resumed.seen["batch"]) is int
