"""Losses that are not finite, out of memory, full disks, dying loader workers."""

import errno
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from etude import Trainer
from etude.engine import Algorithm, Callback, Event
from etude.trainer import CheckpointSaver
from helpers.linear_training import make_linear_trainer
from helpers.networks import LinearModel, vectors
from helpers.resumable import differences, fit, rows_of
from helpers.resumable import make_trainer as make_resnet_trainer

NAN, INF = float("nan"), float("inf")


class NormModel(LinearModel):
    """With running statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.3)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        pairs = batch[0].view(-1, 4, 2)  # so that BatchNorm takes a single row
        return self.linear(self.dropout(self.norm(pairs).flatten(1)))


class Spoil(Algorithm):
    """Multiplies the loss of some steps by a number."""

    def __init__(self, factor: float, *steps: int) -> None:
        self.factor, self.steps = factor, steps

    def match(self, event: Event, state: Any) -> bool:
        return event is Event.AFTER_LOSS and state.timestamp.batch in self.steps

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        state.loss = state.loss * self.factor


class History(Callback):
    """What the model and its optimizer held before and after each step."""

    def __init__(self) -> None:
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []

    def batch_start(self, state: Any, logger: Any) -> None:
        self.before.append(self.look(state))

    def batch_end(self, state: Any, logger: Any) -> None:
        self.after.append(self.look(state))

    def look(self, state: Any) -> dict[str, Any]:
        momenta = [dict(values) for values in state.optimizers[0].state.values()]
        momenta = [{name: value.clone() for name, value in values.items()} for values in momenta]
        return {"model": {name: t.clone() for name, t in state.model.state_dict().items()}, "momenta": momenta}


def make_trainer(model: LinearModel | None = None, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    return make_linear_trainer(NormModel() if model is None else model, **settings)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class TestALossThatIsNoNumber:
    @pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "amp_fp16"])
    @pytest.mark.parametrize("microbatch_size", [None, 2])
    @pytest.mark.parametrize("factor", [NAN, INF, -INF])
    def test_it_ends_training_before_the_update(
        self, factor: float, microbatch_size: int | None, precision: str
    ) -> None:
        history = History()
        trainer = make_trainer(
            algorithms=Spoil(factor, 3),
            callbacks=history,
            device_train_microbatch_size=microbatch_size,
            precision=precision,
        )
        message = f"the loss of step 3 is {factor}, and at most max_nonfinite_steps=0 such steps in a row are skipped"
        with pytest.raises(FloatingPointError, match=message):
            trainer.fit()
        assert len(history.before) in (4, 5), "it is known before the next update at the latest"
        now = history.look(trainer.state)
        assert [now["model"][name].equal(t) for name, t in history.before[3]["model"].items() if "linear" in name] == [
            True,
            True,
        ]
        assert differences(history.before[3]["momenta"], now["momenta"]) == []
        assert len(now["momenta"]) == 4

    @pytest.mark.parametrize("precision", ["fp32", "amp_fp16"])
    @pytest.mark.parametrize("microbatch_size", [None, 2])
    def test_such_steps_may_be_left_out(
        self, microbatch_size: int | None, precision: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        history = History()
        trainer = make_trainer(
            algorithms=Spoil(NAN, 0, 3, 4, 7),
            callbacks=history,
            device_train_microbatch_size=microbatch_size,
            precision=precision,
            max_nonfinite_steps=2,
        )
        trainer.fit()
        assert trainer.state.timestamp.batch == 12
        left_out = [n for n in range(12) if differences(history.before[n], history.after[n]) == []]
        assert left_out == [0, 3, 4, 7]
        changed = {place for n in (1, 5) for place in differences(history.before[n], history.after[n])}
        assert {".model.linear.weight", ".model.norm.running_mean", ".model.norm.num_batches_tracked"} <= changed
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert warnings == [f"the loss of step {n} is nan: the step is skipped" for n in left_out]

    def test_even_a_batch_that_spoils_batchnorm_leaves_no_trace(self) -> None:
        batches = list(vectors())
        batches[2] = (batches[2][0] * NAN, batches[2][1])
        trainer = make_trainer(train_dataloader=batches, max_nonfinite_steps=1)
        trainer.fit()
        assert all(torch.isfinite(tensor).all() for tensor in trainer.state.model.state_dict().values())

    @pytest.mark.parametrize(
        ("steps", "allowed", "ends_at"),
        [((1, 2), 1, 2), ((1, 2, 3), 2, 3), ((1, 3, 5), 1, None), ((1, 2, 4, 5), 2, None), ((0,), 0, 0)],
    )
    def test_their_number_in_a_row_is_bounded(self, steps: tuple[int, ...], allowed: int, ends_at: int | None) -> None:
        trainer = make_trainer(algorithms=Spoil(NAN, *steps), max_nonfinite_steps=allowed)
        if ends_at is None:
            trainer.fit()
            return
        with pytest.raises(FloatingPointError, match=f"the loss of step {ends_at} is nan"):
            trainer.fit()

    def test_a_resume_leaves_out_the_same_steps(self) -> None:
        def trainer(**settings: Any) -> Trainer:
            return make_trainer(algorithms=Spoil(NAN, 3, 4, 7), max_nonfinite_steps=2, max_duration="9ba", **settings)

        expected = fit(trainer(callbacks=CheckpointSaver("saved", "1ba", num_to_keep=-1)))
        saved = sorted(Path("saved").glob("*.pt"))
        assert len(saved) == 10
        for path in saved:
            assert differences(expected, fit(trainer(load_path=path))) == [], path.name

    def test_a_run_that_ended_so_is_resumed_before_the_step(self) -> None:
        settings = {"save_folder": "saved", "save_interval": "1ba"}
        with pytest.raises(FloatingPointError):
            make_trainer(algorithms=Spoil(NAN, 3), **settings).fit()
        resumed = make_trainer(algorithms=Spoil(NAN, 3), **settings, autoresume=True, max_nonfinite_steps=1)
        assert resumed.state.timestamp.batch == 3
        expected = fit(make_trainer(algorithms=Spoil(NAN, 3), max_nonfinite_steps=1))
        assert differences(expected, fit(resumed)) == []

    def test_steps_that_the_loss_scaler_skips_do_not_raise(self) -> None:
        """Gradients overflow at a scale that is too high; the loss itself is a number."""

        class TooHigh(Callback):
            def fit_start(self, state: Any, logger: Any) -> None:
                state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0**40})

        history = History()
        trainer = make_trainer(precision="amp_fp16", callbacks=[TooHigh(), history], max_duration="40ba")
        trainer.fit()
        assert history.before[0]["model"]["linear.weight"].equal(history.after[0]["model"]["linear.weight"])
        assert not history.before[-1]["model"]["linear.weight"].equal(history.after[-1]["model"]["linear.weight"])
        assert trainer.state.scaler.get_scale() < 2.0**40

    def test_a_resume_of_fp16_keeps_the_scale(self) -> None:
        settings = {"precision": "amp_fp16", "max_duration": "9ba"}
        expected = make_trainer(**settings, callbacks=CheckpointSaver("saved", "1ba", num_to_keep=-1))
        expected.fit()
        resumed = make_trainer(**settings, load_path="saved/ep0-ba4.pt")
        assert resumed.state.scaler.state_dict()["_growth_tracker"] == 4
        resumed.fit()
        assert differences(expected.state.scaler.state_dict(), resumed.state.scaler.state_dict()) == []

    @pytest.mark.parametrize("count", [-1, True, 1.0, None])
    def test_an_invalid_max_nonfinite_steps_is_refused(self, count: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="max_nonfinite_steps must be an int >= 0"):
            make_trainer(max_nonfinite_steps=count)


class Memory(Algorithm):
    """Raises when a microbatch has more rows than fit, at one event of the steps from one on."""

    def __init__(self, rows: int, event: Event = Event.AFTER_FORWARD, first_step: int = 0) -> None:
        self.rows, self.event, self.first_step = rows, event, first_step

    def match(self, event: Event, state: Any) -> bool:
        return event is self.event and state.timestamp.batch >= self.first_step

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        if state.microbatch_num_samples > self.rows:
            raise torch.OutOfMemoryError(f"{state.microbatch_num_samples} rows do not fit")


class TestMemory:
    @pytest.mark.parametrize(
        "event", [Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.BEFORE_BACKWARD, Event.AFTER_BACKWARD]
    )
    @pytest.mark.parametrize("rows", [1, 2, 3])
    def test_halving_until_it_fits_is_as_if_it_had_been_known(self, rows: int, event: Event) -> None:
        fits = {1: 1, 2: 2, 3: 2}[rows]
        expected = fit(make_trainer(algorithms=Memory(rows, event), device_train_microbatch_size=fits))
        found = make_trainer(algorithms=Memory(rows, event), device_train_microbatch_size="auto")
        assert differences(expected, fit(found)) == []
        assert found.state.device_train_microbatch_size == fits

    @pytest.mark.parametrize("method", ["block", "sample"])
    def test_the_drop_plan_stays_the_same(
        self, method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The network with BatchNorm, dropout, stochastic depth and smoothed labels, logged metrics included."""

        class Fail(Callback):
            def after_loss(self, state: Any, logger: Any) -> None:
                if state.microbatch_num_samples > 2:
                    raise torch.OutOfMemoryError("too many")

        expected = fit(make_resnet_trainer(method=method, device_train_microbatch_size=2, run_name="known"))
        found = make_resnet_trainer(
            method=method, device_train_microbatch_size="auto", callbacks=Fail(), run_name="found"
        )
        assert differences(expected, fit(found)) == []
        assert rows_of(Path("runs/known")) == rows_of(Path("runs/found"))
        warnings = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
        assert warnings == ["out of memory: the step is repeated with device_train_microbatch_size=2"]

    def test_random_numbers_of_a_repeated_forward_are_the_same(self) -> None:
        """From the generators of python and numpy, too."""
        import random

        import numpy as np

        class Noise(Algorithm):
            def match(self, event: Event, state: Any) -> bool:
                return event is Event.BEFORE_FORWARD

            def apply(self, event: Event, state: Any, logger: Any) -> None:
                inputs, targets = state.batch
                noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
                state.batch = (inputs + noise, targets)

        expected = fit(make_trainer(algorithms=[Noise(), Memory(2)], device_train_microbatch_size=2))
        found = make_trainer(algorithms=[Noise(), Memory(2)], device_train_microbatch_size="auto")
        assert differences(expected, fit(found)) == []

    def test_a_buffer_that_the_forward_replaces_is_put_back(self) -> None:
        class Mean(LinearModel):
            mean: Tensor

            def __init__(self) -> None:
                torch.manual_seed(0)
                super().__init__()
                self.register_buffer("mean", torch.zeros(8))

            def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
                self.mean = 0.9 * self.mean + 0.1 * batch[0].mean(0)
                return self.linear(batch[0] - self.mean)

        expected = fit(make_trainer(Mean(), algorithms=Memory(2), device_train_microbatch_size=2))
        found = make_trainer(Mean(), algorithms=Memory(2), device_train_microbatch_size="auto")
        assert differences(expected, fit(found)) == []

    def test_the_metrics_are_logged_once_per_step(self) -> None:
        make_trainer(algorithms=Memory(2), device_train_microbatch_size="auto", run_name="run").fit()
        assert [row["step"] for row in rows_of(Path("runs/run"))] == list(range(1, 13))

    def test_one_row_that_does_not_fit_is_an_error(self) -> None:
        trainer = make_trainer(algorithms=Memory(0), device_train_microbatch_size="auto")
        with pytest.raises(torch.OutOfMemoryError, match="1 rows do not fit"):
            trainer.fit()

    @pytest.mark.parametrize("size", [None, 3])
    def test_without_auto_it_is_an_error_at_once(self, size: int | None) -> None:
        trainer = make_trainer(algorithms=Memory(2), device_train_microbatch_size=size)
        with pytest.raises(torch.OutOfMemoryError, match=f"{size or 4} rows do not fit"):
            trainer.fit()

    def test_other_errors_are_not_taken_for_it(self) -> None:
        class Fail(Callback):
            def after_forward(self, state: Any, logger: Any) -> None:
                raise RuntimeError("something else")

        with pytest.raises(RuntimeError, match="something else"):
            make_trainer(callbacks=Fail(), device_train_microbatch_size="auto").fit()

    def test_a_checkpoint_keeps_the_size_that_was_found(self, caplog: pytest.LogCaptureFixture) -> None:
        def trainer(**settings: Any) -> Trainer:
            return make_trainer(algorithms=Memory(2, first_step=3), device_train_microbatch_size="auto", **settings)

        expected = fit(trainer(callbacks=CheckpointSaver("saved", "1ba", num_to_keep=-1)))
        for name, size in {"ep0-ba3": None, "ep0-ba4": 2}.items():
            caplog.clear()
            resumed = trainer(load_path=f"saved/{name}.pt")
            assert resumed.state.device_train_microbatch_size == size
            assert differences(expected, fit(resumed)) == []
            assert ("out of memory" in caplog.text) is (size is None)


def full_while(monkeypatch: pytest.MonkeyPatch, function: str, code: int, is_full: Callable[[], bool]) -> None:
    module = {"os.fsync": os, "torch.save": torch}[function]
    real = getattr(module, function.split(".")[1])

    def call(*args: Any) -> Any:
        if is_full():
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(function, call)


@pytest.mark.parametrize("function", ["os.fsync", "torch.save"])
class TestAFullDisk:
    def run(self, monkeypatch: pytest.MonkeyPatch, function: str, code: int, when_full: str, *steps: int) -> Trainer:
        saver = CheckpointSaver("saved", "1ba", num_to_keep=2, on_full_disk=when_full)  # type: ignore[arg-type]
        trainer = make_trainer(callbacks=saver, max_duration="5ba")
        full_while(monkeypatch, function, code, lambda: trainer.state.timestamp.batch in steps)
        return trainer

    def check_folder(self, *names: str) -> None:
        """Only these checkpoints are there, all of them good, and ``latest`` names the last one."""
        assert sorted(path.name for path in Path("saved").iterdir()) == sorted([*names, "latest"])
        assert Path("saved/latest").read_text().strip() == names[-1]
        for name in names:
            make_trainer(max_duration="5ba", load_path=f"saved/{name}").close()

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_it_stops_training_and_the_checkpoint_before_is_kept(
        self, monkeypatch: pytest.MonkeyPatch, function: str, code: int
    ) -> None:
        trainer = self.run(monkeypatch, function, code, "stop", 3)
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            trainer.fit()
        assert caught.value.errno == code
        assert caught.value.__notes__ == [
            f"while saving {Path('saved/ep0-ba3.pt').absolute()}; earlier checkpoints are kept"
        ]
        self.check_folder("ep0-ba1.pt", "ep0-ba2.pt")

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_training_continues_if_configured_and_the_next_save_works(
        self, monkeypatch: pytest.MonkeyPatch, function: str, code: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        expected = fit(make_trainer(max_duration="5ba"))
        trainer = self.run(monkeypatch, function, code, "continue", 2, 3)
        assert differences(expected, fit(trainer)) == []
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert errors == [
            f"no space left to save {Path().absolute()}/saved/ep0-ba{n}.pt, training continues with "
            "the previous one kept"
            for n in (2, 3)
        ]
        self.check_folder("ep0-ba4.pt", "ep0-ba5.pt")

    def test_meanwhile_the_checkpoint_before_is_kept(self, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
        self.run(monkeypatch, function, errno.ENOSPC, "continue", 3, 4, 5).fit()
        self.check_folder("ep0-ba1.pt", "ep0-ba2.pt")

    def test_the_end_is_tried_again(self, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
        """What was not saved when the last interval was over is saved when training ends."""
        trainer = self.run(monkeypatch, function, errno.ENOSPC, "continue")
        tries: list[int] = []
        module = {"os.fsync": os, "torch.save": torch}[function]
        real = getattr(module, function.split(".")[1])

        def once(*args: Any) -> Any:
            if trainer.state.timestamp.batch == 5 and not tries:
                tries.append(1)
                raise OSError(errno.ENOSPC, "No space left")
            return real(*args)

        monkeypatch.setattr(function, once)
        trainer.fit()
        assert tries == [1]
        self.check_folder("ep0-ba4.pt", "ep0-ba5.pt")

    def test_at_the_first_save_it_always_stops(self, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
        trainer = self.run(monkeypatch, function, errno.ENOSPC, "continue", 0)
        with pytest.raises(OSError, match="No space left"):
            trainer.fit()
        assert trainer.state.timestamp.batch == 0
        assert list(Path("saved").iterdir()) == []

    @pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EROFS])
    def test_other_errors_always_stop(self, monkeypatch: pytest.MonkeyPatch, function: str, code: int) -> None:
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            self.run(monkeypatch, function, code, "continue", 3).fit()
        assert caught.value.errno == code
        self.check_folder("ep0-ba1.pt", "ep0-ba2.pt")


class DyingData(Dataset):
    """Its worker dies when a file is there, which it removes, and sample 17 is asked for."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 17 and Path("die").exists():
            Path("die").unlink()
            if self.how == "exit":
                os._exit(3)
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.randn(8), index % 3


WORKER_DIED = r"DataLoader worker \(pid\(?s? ?.*\) (exited unexpectedly|is killed)|died while it sent a batch"


# torch raises the error from a signal handler, wherever the main process is, which may have just opened a file.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_loader_worker_that_dies_ends_training_with_a_clear_error_and_it_can_be_resumed(how: str) -> None:
    def trainer(**settings: Any) -> Trainer:
        return make_trainer(train_dataloader=DataLoader(DyingData(how), 4, num_workers=2), **settings)

    expected = fit(trainer())
    settings = {"save_folder": "saved", "save_interval": "1ba"}

    class Prepare(Callback):
        def epoch_end(self, state: Any, logger: Any) -> None:
            Path("die").touch()

    with pytest.raises(RuntimeError, match=WORKER_DIED):
        trainer(**settings, callbacks=Prepare()).fit()
    assert not Path("die").exists()
    resumed = trainer(**settings, autoresume=True)
    assert 6 <= resumed.state.timestamp.batch < 12
    assert differences(expected, fit(resumed)) == []
