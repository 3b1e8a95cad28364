"""Repeated calls of `fit` and `eval`, with other data, durations or subsets."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.utils.data import DataLoader

from etude.engine import Algorithm, Callback, Event, LoggerDestination, State, Time
from etude.trainer import CheckpointSaver, Trainer
from etude.trainer.checkpoint.file import read_checkpoint
from helpers.networks import LinearModel, vectors

LOSS = "loss/eval/total"


def make_trainer(train: Any = None, evaluation: Any = None, duration: Any = "1ep", **settings: Any) -> Trainer:
    """Six batches of four rows per epoch."""
    torch.manual_seed(0)
    model = LinearModel()
    train = vectors() if train is None else train
    return Trainer(
        model,
        train or None,
        evaluation,
        duration,
        optimizers=SGD(model.parameters(), lr=0.1, momentum=0.9),
        device="cpu",
        progress_bar=False,
        **settings,
    )


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(trainer.state.model.parameters()).detach().clone()


class TestDuration:
    @pytest.mark.parametrize(("first", "second"), [("1ep", "1ep"), ("3ba", "9ba"), ("1ep", 1), ("20sp", "28sp")])
    def test_training_on_ends_as_training_at_once(self, first: str, second: str | int) -> None:
        whole = make_trainer(duration="2ep" if second != "28sp" else "48sp")
        whole.fit()
        trainer = make_trainer(duration=first)
        trainer.fit()
        trainer.fit(duration=second)
        assert trainer.state.timestamp == whole.state.timestamp
        assert torch.equal(weights(trainer), weights(whole))

    def test_it_may_be_given_to_fit_alone(self) -> None:
        trainer = make_trainer(duration=None)
        with pytest.raises(ValueError, match="max_duration or duration must be given to fit"):
            trainer.fit()
        trainer.fit("4ba")
        assert trainer.state.timestamp.batch == 4
        assert trainer.state.settings["max_duration"] == "4ba"

    def test_a_stopped_training_can_continue(self) -> None:
        class Stop(Callback):
            def batch_end(self, state: State, logger: Any) -> None:
                state.stop_training()

        trainer = make_trainer(callbacks=Stop())
        trainer.fit()
        trainer.fit(duration="1ba")
        assert trainer.state.timestamp.batch == 2

    @pytest.mark.parametrize("duration", ["0ba", "0.5dur", 1.5])
    def test_a_bad_one_is_refused_and_the_trainer_stays_open(self, duration: Any) -> None:
        trainer = make_trainer()
        with pytest.raises((ValueError, TypeError), match="duration"):
            trainer.fit(duration=duration)
        trainer.fit()


class TestTrainDataloader:
    def test_it_may_be_given_to_fit_alone(self) -> None:
        trainer = make_trainer(train=())
        with pytest.raises(ValueError, match="train_dataloader must be given to fit, got None"):
            trainer.fit()
        trainer.fit(train_dataloader=vectors())
        assert trainer.state.timestamp.batch == 6

    def test_a_default_optimizer_is_made_for_it(self) -> None:
        trainer = Trainer(LinearModel(), max_duration="1ep", device="cpu", progress_bar=False)
        trainer.fit(train_dataloader=vectors())
        assert [type(optimizer).__name__ for optimizer in trainer.state.optimizers] == ["AdamW"]

    def test_other_data_begins_a_new_epoch(self) -> None:
        trainer = make_trainer(duration="4ba")
        trainer.fit()
        trainer.fit(duration="1ep", train_dataloader=vectors(8))
        assert (trainer.state.timestamp.epoch, trainer.state.timestamp.batch) == (2, 6)
        assert trainer.state.settings["train_dataloader"]["samples"] == 8

    def test_bad_data_is_refused_and_the_old_stays(self) -> None:
        data = vectors()
        trainer = make_trainer(train=data)
        with pytest.raises(ValueError, match="train_dataloader must have in_order=True"):
            trainer.fit(train_dataloader=DataLoader(data.dataset, 4, num_workers=1, in_order=False))
        assert trainer.state.train_dataloader is data
        trainer.fit()


class TestResetTime:
    def test_everything_is_counted_from_zero(self) -> None:
        trainer = make_trainer(evaluation=vectors())
        trainer.fit()
        trainer.fit(reset_time=True)
        assert trainer.state.timestamp.batch == 6
        assert trainer.state.evaluated_at == 6

    def test_with_checkpoints_it_is_refused(self, tmp_path: Path) -> None:
        trainer = make_trainer(save_folder=tmp_path)
        with pytest.raises(ValueError, match="reset_time must be False with a CheckpointSaver"):
            trainer.fit(reset_time=True)


class TestEvaluation:
    def test_other_data_is_evaluated_and_the_own_stays(self) -> None:
        own, other = vectors(8), vectors(20)
        trainer = make_trainer(evaluation=own)
        alone = make_trainer(evaluation=other).eval()
        assert trainer.eval(other) == alone != trainer.eval()
        assert trainer.state.eval_dataloader is own
        trainer.eval(other)
        assert trainer.state.evaluated_at == 0

    def test_data_can_be_given_to_eval_only(self) -> None:
        trainer = make_trainer()
        with pytest.raises(ValueError, match="eval_dataloader must be given to evaluate"):
            trainer.eval()
        assert trainer.eval(vectors())[LOSS] > 0

    def test_other_data_leaves_the_evaluation_at_the_end_due(self) -> None:
        trainer = make_trainer(evaluation=vectors(8), eval_interval="5ba", duration="3ba")
        trainer.eval(vectors())
        trainer.fit()
        assert trainer.state.evaluated_at == 3

    @pytest.mark.parametrize("count", [1, 2, 6, 9, -1])
    def test_a_part_of_the_batches(self, count: int) -> None:
        batches = list(vectors())
        expected = make_trainer(evaluation=batches if count == -1 else batches[:count]).eval()
        assert make_trainer(evaluation=vectors()).eval(subset_num_batches=count) == expected
        assert make_trainer(evaluation=vectors(), eval_subset_num_batches=count).eval() == expected

    @pytest.mark.parametrize("count", [0, -2, 1.5, True])
    def test_an_invalid_subset_is_refused(self, count: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="subset_num_batches must be an int >= 1"):
            make_trainer(evaluation=vectors()).eval(subset_num_batches=count)


class TestTrainSubset:
    def test_every_epoch_ends_after_so_many_batches(self) -> None:
        trainer = make_trainer(duration="3ep", train_subset_num_batches=2)
        assert trainer.state.batches_per_epoch == 2
        trainer.fit()
        assert (trainer.state.timestamp.epoch, trainer.state.timestamp.batch) == (3, 6)

    @pytest.mark.parametrize("save_at", ["1ba", "1ep"])
    def test_a_resume_ends_the_same(self, tmp_path: Path, save_at: str) -> None:
        settings = {"duration": "2ep", "train_subset_num_batches": 3, "train": vectors(shuffle=True)}
        whole = make_trainer(**settings, callbacks=CheckpointSaver(tmp_path, save_at, num_to_keep=-1))
        whole.fit()
        paths = sorted(tmp_path.glob("*.pt"))
        assert len(paths) >= 3
        for path in paths:
            resumed = make_trainer(**settings, load_path=path)
            resumed.fit()
            assert torch.equal(weights(resumed), weights(whole)), path.name

    def test_another_part_makes_another_training(self, tmp_path: Path) -> None:
        make_trainer(train_subset_num_batches=2, save_folder=tmp_path).fit()
        with pytest.raises(ValueError, match="train_subset_num_batches: 2 -> 3"):
            make_trainer(train_subset_num_batches=3, load_path=tmp_path)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [(2, [12, 24]), (0, []), ("0ba", []), ("24sp", [6, 12, 18, 24]), ("30sp", [8, 15, 23, 24]),
     ("0.25dur", [6, 12, 18, 24]), ("0.3dur", [8, 15, 22, 24]), (Time(7, "ba"), [7, 14, 21, 24])],
)  # fmt: skip
def test_evaluation_in_every_unit(interval: Any, expected: list[int]) -> None:
    seen = []

    class See(Callback):
        def eval_start(self, state: State, logger: Any) -> None:
            seen.append(int(state.timestamp.batch))

    make_trainer(evaluation=vectors(), duration="4ep", eval_interval=interval, callbacks=See()).fit()
    assert seen == expected


class TestSaveCheckpoint:
    def test_it_resumes_like_one_of_the_saver(self, tmp_path: Path) -> None:
        trainer = make_trainer(duration="4ba")
        trainer.fit()
        trainer.save_checkpoint(tmp_path / "mine.pt")
        whole = make_trainer(duration="9ba")
        whole.fit()
        resumed = make_trainer(duration="9ba", load_path=tmp_path / "mine.pt")
        resumed.fit()
        assert torch.equal(weights(resumed), weights(whole))


class Failing(Callback):
    """Raises at one event when so many batches are finished."""

    def __init__(self, event: Event, batch: int) -> None:
        def fail(state: State, logger: Any) -> None:
            if state.timestamp.batch == batch:
                raise KeyError("a bug")

        setattr(self, event.value, fail)


class FailingLogger(LoggerDestination):
    def batch_end(self, state: State, logger: Any) -> None:
        if state.timestamp.batch == 9:
            raise KeyError("a bug")


class TestAnError:
    @pytest.mark.parametrize(
        ("event", "batch"),
        [
            (Event.EVAL_START, 6),
            (Event.EVAL_BATCH_END, 6),
            (Event.BATCH_END, 9),
            (Event.EPOCH_END, 6),
            (Event.BATCH_CHECKPOINT, 9),
            (Event.BEFORE_DATALOADER, 9),
        ],
    )
    def test_between_steps_loses_no_step(self, tmp_path: Path, event: Event, batch: int) -> None:
        make = partial(make_trainer, train=vectors(shuffle=True), evaluation=vectors(8), duration="3ep")
        whole = make()
        whole.fit()
        trainer = make(callbacks=Failing(event, batch), save_folder=tmp_path, save_interval="3ep")
        with pytest.raises(KeyError, match="a bug"):
            trainer.fit()
        saved = read_checkpoint(tmp_path / (tmp_path / "latest").read_text().strip())
        assert saved["progress"]["timestamp"]["batch"] == batch
        resumed = make(save_folder=tmp_path, autoresume=True)
        resumed.fit()
        assert torch.equal(weights(resumed), weights(whole))
        assert resumed.state.eval_metrics == whole.state.eval_metrics

    def test_in_a_step_saves_nothing(self, tmp_path: Path) -> None:
        trainer = make_trainer(callbacks=Failing(Event.AFTER_LOSS, 4), save_folder=tmp_path)
        with pytest.raises(KeyError, match="a bug"):
            trainer.fit()
        assert (tmp_path / "latest").read_text() == "ep0-ba0.pt\n"

    def test_before_an_algorithm_has_finished_the_step_saves_nothing(self, tmp_path: Path) -> None:
        class Average(Algorithm):
            def match(self, event: Event, state: State) -> bool:
                return event is Event.BATCH_END

            def apply(self, event: Event, state: State, logger: Any) -> None:
                if state.timestamp.batch == 4:
                    raise KeyError("a bug")

        with pytest.raises(KeyError, match="a bug"):
            make_trainer(algorithms=Average(), save_folder=tmp_path).fit()
        assert (tmp_path / "latest").read_text() == "ep0-ba0.pt\n"

    def test_an_evaluation_that_failed_is_made_up_for(self, tmp_path: Path) -> None:
        settings = {"evaluation": vectors(8), "duration": "3ep", "save_folder": tmp_path}
        with pytest.raises(KeyError, match="a bug"):
            make_trainer(**settings, callbacks=Failing(Event.EVAL_START, 6)).fit()
        seen: list[int] = []

        class See(Callback):
            def eval_start(self, state: State, logger: Any) -> None:
                seen.append(int(state.timestamp.batch))

        make_trainer(**settings, autoresume=True, callbacks=See()).fit()
        assert seen == [6, 12, 18]


def test_a_damaged_checkpoint_does_not_count_among_those_to_keep(tmp_path: Path) -> None:
    settings = {"save_folder": tmp_path, "save_interval": "1ba", "save_num_checkpoints_to_keep": 2, "duration": "6ba"}
    make_trainer(**{**settings, "duration": "4ba"}).fit()
    (tmp_path / "ep0-ba9.pt").write_bytes(b"damaged")
    (tmp_path / "ep0-ba8.pt").write_bytes(b"damaged")
    (tmp_path / "latest").write_text("ep0-ba9.pt\n")
    make_trainer(**settings, autoresume=True).fit()
    good = [path.name for path in tmp_path.glob("*.pt") if path.stat().st_size > 10]
    assert sorted(good) == ["ep0-ba5.pt", "ep1-ba6.pt"] or sorted(good) == ["ep0-ba6.pt", "ep1-ba6.pt"]
