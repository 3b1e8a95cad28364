"""TensorboardLogger, WandBLogger, ConsoleLogger and InMemoryLogger."""

import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD

from etude import Callback, Logger, LoggerDestination, State, Trainer
from etude.engine import Timestamp
from etude.loggers import ConsoleLogger, InMemoryLogger, TensorboardLogger, WandBLogger
from helpers.networks import LinearModel, vectors

BATCHES = 6  # per epoch


class Gradients(Callback):
    """Logs in the middle of a step."""

    def after_train_batch(self, state: State, logger: Logger) -> None:
        logger.log_metrics({"gradient": state.timestamp.batch + 1})


class Crash(Callback):
    def __init__(self, batch: int | None) -> None:
        self.batch = batch

    def batch_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == self.batch:
            raise KeyboardInterrupt


def fit(logger: LoggerDestination, *, crash_at: int | None = None, max_duration: str = "2ep", **settings: Any) -> None:
    torch.manual_seed(0)
    model = LinearModel()
    trainer = Trainer(
        model,
        vectors(),
        vectors(8),
        max_duration,
        optimizers=SGD(model.parameters(), lr=0.1),
        callbacks=[Gradients(), Crash(crash_at)],
        loggers=logger,
        progress_bar=False,
        device="cpu",
        **settings,
    )
    if crash_at is not None:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
    else:
        trainer.fit()
        trainer.close()


class TestInMemory:
    def test_each_value_is_kept_with_its_timestamp(self) -> None:
        logger = InMemoryLogger()
        fit(logger)
        assert [(timestamp.batch, value) for timestamp, value in logger.data["gradient"]] == [
            (batch, batch) for batch in range(1, 13)
        ]
        assert [timestamp.epoch for timestamp, _ in logger.data["loss/eval/total"]] == [1, 2]
        assert logger.most_recent_values["gradient"] == 12
        assert logger.most_recent_timestamps["gradient"].batch == 12
        assert logger.hyperparameters["max_duration"] == "2ep"

    def test_a_time_series_has_arrays_of_one_length(self) -> None:
        logger = InMemoryLogger()
        fit(logger)
        series = logger.get_timeseries("loss/train/total")
        assert set(series) == {"loss/train/total", *Timestamp().state_dict()}
        assert {values.shape for values in series.values()} == {(12,)}
        np.testing.assert_array_equal(series["batch"], np.arange(1, 13))
        np.testing.assert_array_equal(series["sample"], 4 * np.arange(1, 13))
        with pytest.raises(ValueError, match=r"metric must be one that was logged, .* got 'loss'"):
            logger.get_timeseries("loss")

    def test_a_tensor_that_changes_later_is_kept_as_it_was(self) -> None:
        logger, value = InMemoryLogger(), torch.tensor(1.0)
        logger.log_metrics({"a": value}, 1)
        value.fill_(2.0)
        assert float(logger.data["a"][0][1]) == 1.0

    @pytest.mark.parametrize("crash_at", [3, 6, 7])
    def test_a_resumed_run_has_every_value_once(self, tmp_path: Path, crash_at: int) -> None:
        unbroken, resumed = InMemoryLogger(), InMemoryLogger()
        fit(unbroken)
        fit(InMemoryLogger(), crash_at=crash_at, save_folder=tmp_path, save_interval="2ba")
        fit(resumed, save_folder=tmp_path, save_interval="2ba", autoresume=True)
        for name in (*("loss/train/total", "gradient", "lr"), "loss/eval/total"):
            for key, values in unbroken.get_timeseries(name).items():
                np.testing.assert_array_equal(resumed.get_timeseries(name)[key], values)


class TestConsole:
    @pytest.mark.parametrize(("interval", "batches"), [("1ep", [6, 12]), (2, [12]), ("5ba", [5, 10])])
    def test_metrics_are_printed_once_per_interval(self, interval: str | int, batches: list[int]) -> None:
        stream = io.StringIO()
        fit(ConsoleLogger(interval, stream))
        lines = [line for line in stream.getvalue().splitlines() if "gradient" in line]
        printed = [int(line.split()[3].rstrip(":")) for line in lines]
        # an evaluation, at 6 and 12, and the end of training print what is left
        assert printed == sorted({*batches, 6, 12})

    def test_results_of_an_evaluation_have_a_separate_line(self) -> None:
        stream = io.StringIO()
        fit(ConsoleLogger("1ba", stream), max_duration="1ep")
        *training, evaluation = stream.getvalue().splitlines()
        assert evaluation.startswith("epoch 1  batch 6:  loss/eval/total ")
        assert sum("loss/train/total" in line for line in training) == 6

    @pytest.mark.parametrize("name", ["stdout", "stderr"])
    def test_it_prints_to_the_current_stream(self, name: Any, capsys: pytest.CaptureFixture[str]) -> None:
        fit(ConsoleLogger(stream=name))
        captured = capsys.readouterr()
        assert "loss/eval/total" in getattr(captured, name.removeprefix("std"))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: ConsoleLogger("0ep"), 'log_interval must be positive and in "ep" or "ba", got "0ep"'),
            (lambda: ConsoleLogger("1min"), 'log_interval must be .* got "1min"'),
            (lambda: ConsoleLogger(stream="file"), "stream must be"),  # type: ignore[arg-type]
        ],
    )
    def test_bad_arguments_are_refused(self, make: Callable[[], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = events.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


class TestTensorboard:
    def test_each_metric_is_a_scalar_of_its_step(self, tmp_path: Path) -> None:
        kept = InMemoryLogger()
        fit(kept)
        fit(TensorboardLogger(tmp_path / "run"))
        found = scalars(tmp_path / "run")
        assert set(found) == set(kept.data)
        assert found["gradient"] == [(batch, batch) for batch in range(1, 13)]
        for name in ("loss/train/total", "loss/eval/total", "lr"):
            expected = [(timestamp.batch, float(value)) for timestamp, value in kept.data[name]]
            assert [step for step, _ in found[name]] == [step for step, _ in expected]
            np.testing.assert_allclose([value for _, value in found[name]], [value for _, value in expected], rtol=1e-6)

    @pytest.mark.parametrize("flush_interval", [1, 2, 100])
    @pytest.mark.parametrize("crash_at", [3, 6, 7, 9])
    def test_a_resumed_run_has_every_row_once(self, tmp_path: Path, crash_at: int, flush_interval: int) -> None:
        fit(TensorboardLogger(tmp_path / "unbroken"))
        saving: dict[str, Any] = {"save_folder": tmp_path / "checkpoints", "save_interval": "2ba"}
        fit(TensorboardLogger(tmp_path / "run", flush_interval), crash_at=crash_at, **saving)
        fit(TensorboardLogger(tmp_path / "run", flush_interval), autoresume=True, **saving)
        unbroken, resumed = scalars(tmp_path / "unbroken"), scalars(tmp_path / "run")
        for name in ("gradient", "loss/train/total", "lr", "loss/eval/total"):
            assert resumed[name] == unbroken[name]

    def test_settings_are_kept_as_text_once(self, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        fit(TensorboardLogger(tmp_path))
        events = EventAccumulator(str(tmp_path)).Reload()
        (event,) = events.Tensors("settings/text_summary")
        assert b'"max_duration": "2ep"' in event.tensor_proto.string_val[0]

    def test_a_folder_of_another_run_is_announced(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        fit(TensorboardLogger(tmp_path), max_duration="1ba")
        caplog.clear()
        fit(TensorboardLogger(tmp_path), max_duration="1ba")
        assert f"{tmp_path} holds the metrics of another run" in caplog.text

    def test_a_full_disk_does_not_end_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(self: Any, rows: Any) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(TensorboardLogger, "write_rows", fail)
        fit(TensorboardLogger(tmp_path, 1))
        assert caplog.text.count("TensorboardLogger failed, training continues without it") == 1

    @pytest.mark.parametrize("interval", [0, -1, True, 1.5])
    def test_a_bad_interval_is_refused(self, interval: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="rows_per_write must be an int >= 1"):
            TensorboardLogger(flush_interval=interval)


class FakeRun:
    """A run of wandb that keeps what it gets."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.configuration: dict[str, Any] = {}
        self.is_finished = False

    @property
    def config(self) -> Any:
        return self

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        self.configuration.update(values)

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append((step, row))

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    import wandb

    started: list[FakeRun] = []

    def init(**settings: Any) -> FakeRun:
        started.append(FakeRun(**settings))
        return started[-1]

    monkeypatch.setattr(wandb, "init", init)
    return started


class TestWandB:
    def test_rows_and_settings_go_to_one_run(self, runs: list[FakeRun]) -> None:
        fit(WandBLogger("project", name="run", tags=["a"], init_kwargs={"mode": "offline"}))
        (run,) = runs
        assert run.settings.items() >= {"project": "project", "name": "run", "tags": ["a"], "mode": "offline"}.items()
        assert run.configuration["max_duration"] == "2ep"
        assert [step for step, _ in run.rows] == [*range(1, 13)]
        assert [row["gradient"] for _, row in run.rows] == [*range(1, 13)]
        assert run.is_finished

    @pytest.mark.parametrize("crash_at", [3, 7])
    def test_a_resumed_run_continues_the_run(self, runs: list[FakeRun], tmp_path: Path, crash_at: int) -> None:
        fit(WandBLogger())
        fit(WandBLogger(rows_per_write=1), crash_at=crash_at, save_folder=tmp_path, save_interval="2ba")
        fit(WandBLogger(rows_per_write=1), save_folder=tmp_path, save_interval="2ba", autoresume=True)
        unbroken, first, resumed = runs
        assert resumed.settings["id"] == first.settings["id"] != unbroken.settings["id"]
        assert resumed.settings["resume"] == "allow"
        assert "resume" not in first.settings
        # the server keeps the first row of a step
        rows = dict((*resumed.rows, *first.rows))
        assert sorted(rows) == [*range(1, 13)]
        for step, row in unbroken.rows:
            assert {name: value for name, value in rows[step].items() if "time" not in name} == {
                name: value for name, value in row.items() if "time" not in name
            }

    def test_arguments_that_the_logger_sets_itself_are_refused(self) -> None:
        with pytest.raises(
            ValueError, match="init_kwargs must not contain arguments that the logger sets, got 'project'"
        ):
            WandBLogger("project", init_kwargs={"project": "other"})

    @pytest.mark.slow
    def test_a_run_without_network(self, tmp_path: Path) -> None:
        """In a process of its own, as wandb leaves a service behind that ends with it."""
        code = """
            from etude import Trainer
            from etude.loggers import WandBLogger
            from helpers.networks import LinearModel, vectors

            logger = WandBLogger("project", init_kwargs={"mode": "offline"})
            trainer = Trainer(LinearModel(), vectors(), vectors(8), "1ep", loggers=logger, progress_bar=False)
            trainer.fit()
            trainer.close()
        """
        path = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
        environment = {**os.environ, "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true", "PYTHONPATH": path}
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, cwd=tmp_path, check=True)
        (data,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
        content = data.read_bytes()
        assert b"loss/train/total" in content
        assert b"loss/eval/total" in content


@pytest.mark.parametrize(
    ("make", "package"), [(TensorboardLogger, "tensorboard"), (WandBLogger, "wandb")], ids=["tensorboard", "wandb"]
)
def test_a_missing_package_is_named_at_construction(
    make: Callable[[], Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'etude\[{package}\]'"):
        make()
