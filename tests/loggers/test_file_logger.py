"""FileLogger."""

import copy
import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from etude.engine import Algorithm, Event, Logger, State, Timestamp
from etude.loggers import FileLogger
from etude.trainer import Trainer
from helpers.networks import LinearModel, vectors

STATE = State(model=nn.Identity())
LOGGER = Logger(STATE)


def json_rows(folder) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def csv_rows(folder) -> list[dict]:
    """The rows of the table as JSON has them: numbers, and no entry where the cell is empty."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(cell) for name, cell in row.items() if cell} for row in rows]


BAD_ROWS: list[Any] = [None, {}, [4], [[4]], [{}, {}], [[4, None]], [["4", {}]], [[-1, {}]]]


class TestRows:
    def test_metrics_of_one_step_are_one_row(self, tmp_path):
        logger = FileLogger(tmp_path)
        logger.log_metrics({"loss": 0.5}, step=1)
        logger.log_metrics({"lr": 0.1}, step=1)
        logger.log_metrics({"loss": 0.25}, step=2)
        logger.close(STATE, LOGGER)
        assert json_rows(tmp_path) == [{"step": 1, "loss": 0.5, "lr": 0.1}, {"step": 2, "loss": 0.25}]

    def test_the_latest_value_of_a_name_is_kept(self, tmp_path):
        logger = FileLogger(tmp_path)
        logger.log_metrics({"loss": 0.5}, step=1)
        logger.log_metrics({"loss": 0.25}, step=1)
        logger.close(STATE, LOGGER)
        assert json_rows(tmp_path) == [{"step": 1, "loss": 0.25}]

    def test_tensors_become_numbers(self, tmp_path):
        logger = FileLogger(tmp_path)
        logger.log_metrics({"float": torch.tensor(0.5), "whole": torch.tensor(3)}, step=1)
        logger.close(STATE, LOGGER)
        assert json_rows(tmp_path) == [{"step": 1, "float": 0.5, "whole": 3}]

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("kind", [float, torch.tensor])
    def test_values_that_json_does_not_support_are_null(self, tmp_path, value, kind):
        logger = FileLogger(tmp_path)
        logger.log_metrics({"loss": kind(value), "lr": 0.1}, step=1)
        logger.close(STATE, LOGGER)
        assert json_rows(tmp_path) == [{"step": 1, "loss": None, "lr": 0.1}]
        assert csv_rows(tmp_path) == [{"step": 1, "lr": 0.1}]

    @pytest.mark.parametrize("rows_per_write", [1, 2, 3, 10])
    def test_the_size_of_the_groups_does_not_change_the_files(self, tmp_path, rows_per_write):
        """The table gets a new column in the middle and at the end."""
        logger = FileLogger(tmp_path, rows_per_write)
        expected = []
        for step in range(1, 8):
            row = {
                "loss": 1 / step,
                **({"accuracy": 0.1 * step} if step % 3 == 0 else {}),
                **({"z": 1} if step == 7 else {}),
            }
            expected.append({"step": step, **row})
            for name, value in row.items():
                logger.log_metrics({name: value}, step)
        logger.close(STATE, LOGGER)
        assert json_rows(tmp_path) == expected
        assert csv_rows(tmp_path) == expected

    def test_a_name_with_a_comma_and_quotes_survives_a_growing_table(self, tmp_path):
        logger = FileLogger(tmp_path, rows_per_write=1)
        logger.log_metrics({'a, "b"': 0.5}, step=1)
        logger.log_metrics({"c": 1.5}, step=2)
        logger.close(STATE, LOGGER)
        assert csv_rows(tmp_path) == json_rows(tmp_path) == [{"step": 1, 'a, "b"': 0.5}, {"step": 2, "c": 1.5}]

    def test_rows_wait_until_their_group_is_full(self, tmp_path):
        logger = FileLogger(tmp_path, rows_per_write=3)
        for step in (1, 2, 3):
            logger.log_metrics({"loss": 0.5}, step)
            assert list(tmp_path.iterdir()) == []
        logger.log_metrics({"loss": 0.5}, 4)
        assert [row["step"] for row in json_rows(tmp_path)] == [1, 2, 3]
        logger.close(STATE, LOGGER)

    @pytest.mark.parametrize("event", [Event.EPOCH_CHECKPOINT, Event.EVAL_STANDALONE_END, Event.FIT_END])
    def test_rows_are_written_at_the_end_of(self, tmp_path, event):
        logger = FileLogger(tmp_path)
        logger.log_metrics({"loss": 0.5}, 1)
        getattr(logger, event.value)(STATE, LOGGER)
        assert json_rows(tmp_path) == csv_rows(tmp_path) == [{"step": 1, "loss": 0.5}]
        logger.close(STATE, LOGGER)

    def test_a_metric_that_has_the_name_of_the_number_of_the_row_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r'metrics must not be named "step", .* got \{\'step\': 0.5\}'):
            FileLogger(tmp_path).log_metrics({"step": 0.5}, 1)

    def test_closing_without_rows_writes_nothing(self, tmp_path):
        FileLogger(tmp_path / "run").close(STATE, LOGGER)
        assert list(tmp_path.iterdir()) == []


class TestFolder:
    def test_it_is_created_with_the_first_row(self, tmp_path):
        folder = tmp_path / "runs" / "mine"
        logger = FileLogger(folder)
        assert list(tmp_path.iterdir()) == []
        logger.log_metrics({"loss": 0.5}, 1)
        logger.close(STATE, LOGGER)
        assert json_rows(folder) == [{"step": 1, "loss": 0.5}]

    def test_a_folder_with_metrics_is_refused_and_unchanged(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text("earlier\n")
        with pytest.raises(FileExistsError, match="must not hold metrics of another run, got") as caught:
            FileLogger(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert (tmp_path / "metrics.jsonl").read_text() == "earlier\n"

    @pytest.mark.parametrize("rows", [0, -1])
    def test_a_group_of_no_rows_is_refused(self, tmp_path, rows):
        with pytest.raises(ValueError, match=f"rows_per_write must be an int >= 1, got {rows}"):
            FileLogger(tmp_path, rows)

    def test_settings_are_kept_as_json(self, tmp_path):
        FileLogger(tmp_path / "run").log_hyperparameters({"lr": 0.1, "device": torch.device("cpu"), "names": ["a"]})
        text = (tmp_path / "run" / "settings.json").read_text()
        assert json.loads(text) == {"lr": 0.1, "device": "cpu", "names": ["a"]}


class Do(Algorithm):
    """Calls a function with state and logger at one event, from some batch on."""

    def __init__(self, event, function, from_batch=0):
        self.event, self.function, self.from_batch = event, function, from_batch

    def match(self, event, state):
        return event is self.event and state.timestamp.batch >= self.from_batch

    def apply(self, event, state, logger):
        self.function(state, logger)


@pytest.fixture
def trainer(tmp_path):
    """Builds a Trainer of 2 epochs of 3 batches, evaluated after batches 2, 4 and 6, and closes it."""
    trainers = []

    def build(*algorithms) -> Trainer:
        data, logger = vectors(12, 4), FileLogger(tmp_path, rows_per_write=2)
        settings = {"loggers": logger, "eval_interval": "2ba", "device": "cpu", "progress_bar": False}
        trainers.append(Trainer(LinearModel(), data, data, "2ep", algorithms, **settings))
        return trainers[-1]

    yield build
    for built in trainers:
        built.close()


class TestInTraining:
    def test_there_is_one_row_per_batch_with_everything_that_was_logged(self, trainer, tmp_path):
        def log(state, logger):
            logger.log_metrics({"mine": 10 * state.timestamp.batch})

        trainer(Do(Event.BATCH_END, log)).fit()
        rows = json_rows(tmp_path)
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert [row["mine"] for row in rows] == [10, 20, 30, 40, 50, 60]
        assert all({"loss/train/total", "lr", "epoch"} <= set(row) for row in rows)
        assert [row["step"] for row in rows if "loss/eval/total" in row] == [2, 4, 6]
        assert [row["step"] for row in rows if "time/epoch_seconds" in row] == [3, 6]

    def test_the_table_holds_the_same_values(self, trainer, tmp_path):
        trainer().fit()
        rows = json_rows(tmp_path)
        assert len(rows) == 6
        assert csv_rows(tmp_path) == rows

    def test_everything_is_written_when_fit_returns(self, trainer, tmp_path):
        built = trainer()
        built.fit()
        rows = json_rows(tmp_path)
        built.close()
        assert len(rows) == 6
        assert json_rows(tmp_path) == rows

    def test_a_metric_that_is_not_a_number_is_null(self, trainer, tmp_path):
        def diverge(state, logger):
            logger.log_metrics({"mine": state.loss.detach() * math.nan})

        trainer(Do(Event.BATCH_END, diverge, from_batch=4)).fit()
        rows = json_rows(tmp_path)
        assert [row["step"] for row in rows if "mine" in row] == [4, 5, 6]
        assert [row["mine"] for row in rows[3:]] == [None] * 3

    def test_metrics_before_an_exception_are_written(self, trainer, tmp_path):
        def fail(state, logger):
            raise OSError("gone")

        with pytest.raises(OSError, match="gone"):
            trainer(Do(Event.BATCH_START, fail, from_batch=5)).fit()
        assert [row["step"] for row in json_rows(tmp_path)] == [1, 2, 3, 4, 5]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run() -> list[Callable[[FileLogger], None]]:
    """Everything that a logger is told by 3 epochs of 4 batches with evaluations, two of them after training."""
    told: list[Callable[[FileLogger], None]] = []

    def log(step: int, **metrics: float | torch.Tensor) -> None:
        told.append(lambda logger: logger.log_metrics(metrics, step))

    def announce(event: Event, step: int) -> None:
        state = State(model=nn.Identity(), timestamp=Timestamp(batch=step))
        told.append(lambda logger: getattr(logger, event.value)(state, LOGGER))

    for step in range(1, 13):
        log(step, loss=torch.tensor(1 / step), lr=math.nan if step == 3 else 0.1 * step)
        if step == 6:
            log(step, **{"after, a while": step})
        if step % 4 == 0:
            log(step, time=0.25)
            log(step, accuracy=torch.tensor(step))
            announce(Event.EPOCH_CHECKPOINT, step)
    announce(Event.FIT_END, 12)
    for evaluation in (1, 2):
        log(12, accuracy=evaluation)
        announce(Event.EVAL_STANDALONE_END, 12)
    return told


def tell(logger: FileLogger, told: list[Callable[[FileLogger], None]]) -> FileLogger:
    for call in told:
        call(logger)
    return logger


def resume(folder: Path, state: dict, told: list[Callable[[FileLogger], None]], rows_per_write: int = 10) -> None:
    """Continue a run from a state with a new logger."""
    logger = FileLogger(folder, rows_per_write, append=True)
    logger.load_state_dict(state)
    tell(logger, told).close(STATE, LOGGER)


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "undisturbed"
    tell(FileLogger(folder), run()).close(STATE, LOGGER)
    assert [row["step"] for row in json_rows(folder)] == [*range(1, 13), 12, 12]
    return files(folder)


class TestResume:
    @pytest.mark.parametrize("rows_per_write", [1, 3, 10])
    @pytest.mark.parametrize("calls_until_the_kill", [0, 1, 7, 99])
    def test_after_a_kill_at_any_step_the_files_equal_those_of_an_uninterrupted_run(
        self, tmp_path: Path, undisturbed: dict, rows_per_write: int, calls_until_the_kill: int, caplog
    ) -> None:
        told = run()
        for saved in range(len(told) + 1):
            folder = tmp_path / str(saved)
            killed = tell(FileLogger(folder, rows_per_write), told[:saved])
            state = json.loads(json.dumps(killed.state_dict(), allow_nan=False))
            tell(killed, told[saved : saved + calls_until_the_kill])
            resume(folder, state, told[saved:], rows_per_write)
            assert files(folder) == undisturbed
        assert caplog.records == []

    def test_a_kill_at_any_byte_leaves_what_a_resume_needs(self, tmp_path: Path, undisturbed: dict) -> None:
        told = run()
        saver = tell(FileLogger(tmp_path / "run"), told[:8])
        saver.fit_end(STATE, LOGGER)  # writes the 5 rows that are complete
        state, written = saver.state_dict(), (tmp_path / "run" / "metrics.jsonl").stat().st_size
        assert 0 < written < len(undisturbed["metrics.jsonl"])
        for size in range(written, len(undisturbed["metrics.jsonl"]) + 1, 3):
            folder = tmp_path / str(size)
            folder.mkdir()
            for name in undisturbed:
                (folder / name).write_bytes(undisturbed[name][:size])
            resume(folder, state, told[8:])
            assert files(folder) == undisturbed

    def test_the_latest_row_continues_from_the_checkpoint(self, tmp_path: Path) -> None:
        logger = FileLogger(tmp_path)
        logger.log_metrics({"loss": 0.5}, 4)
        state = logger.state_dict()
        logger.log_metrics({"lost": 1}, 4)
        logger.close(STATE, LOGGER)
        resume(tmp_path, state, [lambda resumed: resumed.log_metrics({"accuracy": 0.75}, 4)])
        assert json_rows(tmp_path) == csv_rows(tmp_path) == [{"step": 4, "loss": 0.5, "accuracy": 0.75}]

    def test_an_evaluation_after_the_checkpoint_of_the_same_step_is_dropped(self, tmp_path: Path) -> None:
        logger = FileLogger(tmp_path)
        logger.log_metrics({"loss": 0.5}, 4)
        logger.fit_end(STATE, LOGGER)
        state = logger.state_dict()
        logger.log_metrics({"accuracy": 0.25}, 4)
        logger.eval_standalone_end(STATE, LOGGER)
        resume(tmp_path, state, [])
        assert json_rows(tmp_path) == csv_rows(tmp_path) == [{"step": 4, "loss": 0.5}]

    def test_metrics_before_loading_are_discarded(self, tmp_path: Path) -> None:
        logger = FileLogger(tmp_path)
        logger.log_metrics({"depth": 3}, 0)
        logger.log_metrics({"loss": 0.5}, 1)
        logger.close(STATE, LOGGER)
        resumed = FileLogger(tmp_path, append=True)
        resumed.log_metrics({"depth": 3}, 0)
        resumed.load_state_dict(logger.state_dict())
        resumed.close(STATE, LOGGER)
        assert json_rows(tmp_path) == [{"step": 0, "depth": 3}, {"step": 1, "loss": 0.5}]

    def test_the_logger_that_wrote_can_load_an_earlier_state(self, tmp_path: Path, undisturbed: dict) -> None:
        told = run()
        logger = tell(FileLogger(tmp_path / "run", 2), told[:9])
        state = logger.state_dict()
        tell(logger, told[9:])
        logger.load_state_dict(state)
        tell(logger, told[9:]).close(STATE, LOGGER)
        assert files(tmp_path / "run") == undisturbed

    def test_loading_an_empty_state_removes_all_rows(self, tmp_path: Path) -> None:
        state = FileLogger(tmp_path).state_dict()
        tell(FileLogger(tmp_path), run())
        assert files(tmp_path)
        FileLogger(tmp_path, append=True).load_state_dict(state)
        assert files(tmp_path) == {}


class TestState:
    def test_it_is_plain_values(self, tmp_path: Path) -> None:
        logger = FileLogger(tmp_path, rows_per_write=1)
        logger.log_metrics({"loss": 0.5}, 1)
        logger.log_metrics({"loss": torch.tensor(math.inf), "whole": torch.tensor(3), "mean": np.float64(0.5)}, 2)
        state = logger.state_dict()
        row = {"loss": None, "whole": 3, "mean": 0.5}
        assert state == {"last_step": 1, "num_written": 1, "rows": [[2, row]]}
        assert [type(value) for value in state["rows"][0][1].values()] == [type(None), int, float]

    def test_reading_it_changes_nothing(self, tmp_path: Path, undisturbed: dict) -> None:
        logger = FileLogger(tmp_path / "run", rows_per_write=3)
        for call in run():
            before = files(tmp_path / "run") if (tmp_path / "run").exists() else {}
            logger.state_dict()
            assert (files(tmp_path / "run") if before else {}) == before
            call(logger)
        logger.close(STATE, LOGGER)
        assert files(tmp_path / "run") == undisturbed

    def test_later_metrics_do_not_change_it(self, tmp_path: Path) -> None:
        logger = FileLogger(tmp_path)
        logger.log_metrics({"loss": 0.5}, 1)
        state = logger.state_dict()
        before = copy.deepcopy(state)
        other = FileLogger(tmp_path, append=True)
        other.load_state_dict(state)
        for each in (logger, other):
            each.log_metrics({"loss": 0.25}, 1)
        assert state == before

    @pytest.mark.parametrize("state", [None, [], {}, {"last_step": 1, "rows": []}])
    def test_invalid_states_are_refused(self, tmp_path: Path, state: object) -> None:
        message = "the state of a FileLogger must be a dict of last_step, num_written, rows, got"
        with pytest.raises(ValueError, match=message):
            FileLogger(tmp_path).load_state_dict(state)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("last_step", value) for value in ("4", 4.0, True, -1, [4])),
            *(("num_written", value) for value in (None, "4", 4.0, True, -1)),
            *(("rows", value) for value in BAD_ROWS),
            *(("rows", [[4, row]]) for row in ({"loss": "low"}, {"loss": [0.5]}, {"loss": torch.ones(())}, {4: 0.5})),
            ("rows", [[4, {"loss": 0.5}], [4, {"loss": 0.25}]]),
        ],
    )
    def test_a_value_of_the_wrong_kind_is_refused_and_nothing_changes(
        self, tmp_path: Path, name: str, value: object
    ) -> None:
        tell(FileLogger(tmp_path), run())
        before = files(tmp_path)
        assert before
        state = {"last_step": 4, "num_written": 4, "rows": [[5, {"loss": None, "lr": 0.1}]]}
        with pytest.raises(ValueError, match=f"^{name} in the state of a FileLogger must be .* got"):
            FileLogger(tmp_path, append=True).load_state_dict({**state, name: value})
        assert files(tmp_path) == before
        FileLogger(tmp_path, append=True).load_state_dict(state)


class TestMissingRows:
    STATE = {"last_step": 3, "num_written": 3, "rows": [[4, {"loss": 0.5}]]}  # noqa: RUF012

    def resume(self, folder: Path, caplog: pytest.LogCaptureFixture) -> str:
        """The rows that are left are kept; returns the one warning."""
        resume(folder, self.STATE, [])
        assert json_rows(folder)[-1] == {"step": 4, "loss": 0.5}
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert record.message.startswith("METRICS ARE MISSING: the checkpoint counts on 3 rows up to step 3, but ")
        assert str(folder) in record.message
        return record.message

    def test_in_another_folder_all_are(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert self.resume(tmp_path / "other", caplog).endswith("reaches to no step with 0 rows")

    def test_the_warning_says_how_far_the_file_reaches(self, tmp_path: Path, caplog) -> None:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        assert self.resume(tmp_path, caplog).endswith("reaches to step 2 with 2 rows")
        assert [row["step"] for row in json_rows(tmp_path)] == [1, 2, 4]

    def test_a_gap_is_seen(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\n')
        assert self.resume(tmp_path, caplog).endswith("reaches to step 3 with 2 rows")
        assert [row["step"] for row in json_rows(tmp_path)] == [1, 3, 4]

    @pytest.mark.parametrize(
        "bad",
        [b"", b"step", b"[2]", b'{"loss": 2}', b'{"step": 2.0}', b'{"step": true}', b'{"step": "2"}', b"\xff", b"\0\0"],
    )
    def test_rows_after_an_invalid_line_are_removed(self, tmp_path: Path, bad: bytes, caplog) -> None:
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 3}\n')
        assert self.resume(tmp_path, caplog).endswith("reaches to step 1 with 1 rows")
        assert [row["step"] for row in json_rows(tmp_path)] == [1, 4]

    def test_a_row_without_the_end_of_its_line_is_half_a_line(self, tmp_path: Path, caplog) -> None:
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}')
        assert self.resume(tmp_path, caplog).endswith("reaches to step 2 with 2 rows")


class TestAppend:
    def test_without_a_checkpoint_the_metrics_files_are_overwritten(self, tmp_path: Path, undisturbed: dict) -> None:
        folder = tmp_path / "run"
        earlier = FileLogger(folder)
        earlier.log_metrics({"other": 0.5}, 100)
        earlier.close(STATE, LOGGER)
        before = files(folder)
        logger = FileLogger(folder, append=True)
        assert files(folder) == before
        tell(logger, run()).close(STATE, LOGGER)
        assert files(folder) == undisturbed

    def test_without_a_row_the_metrics_stay(self, tmp_path: Path) -> None:
        tell(FileLogger(tmp_path), run())
        before = files(tmp_path)
        assert before
        FileLogger(tmp_path, append=True).close(STATE, LOGGER)
        assert files(tmp_path) == before

    def test_a_folder_without_metrics_is_like_any_other(self, tmp_path: Path, undisturbed: dict) -> None:
        tell(FileLogger(tmp_path / "run", append=True), run()).close(STATE, LOGGER)
        assert files(tmp_path / "run") == undisturbed


class Killed(BaseException):
    """Stands for the end of the process."""


def die(*_: object) -> None:
    raise Killed


class TestRewriting:
    def test_a_kill_in_the_middle_leaves_the_old_files(self, tmp_path: Path, undisturbed: dict, monkeypatch) -> None:
        told, folder = run(), tmp_path / "run"
        logger = tell(FileLogger(folder, 2), told[:9])
        state = logger.state_dict()
        tell(logger, told[9:])
        before = files(folder)
        assert before == undisturbed
        for name in ("fsync", "replace"):
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(os, name, die)
                FileLogger(folder, append=True).load_state_dict(state)
            assert before.items() <= files(folder).items()
        resume(folder, state, told[9:])
        assert files(folder) == undisturbed

    def test_a_kill_while_the_table_grows_leaves_the_old_table(self, tmp_path: Path, monkeypatch) -> None:
        logger = FileLogger(tmp_path)
        logger.log_metrics({"loss": 0.5}, 1)
        logger.fit_end(STATE, LOGGER)
        logger.log_metrics({"accuracy": 0.5}, 2)
        monkeypatch.setattr(os, "replace", die)
        with pytest.raises(Killed):
            logger.fit_end(STATE, LOGGER)
        assert csv_rows(tmp_path) == [{"step": 1, "loss": 0.5}]
        assert json_rows(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "accuracy": 0.5}]

    def test_new_content_is_on_the_disk_before_it_takes_its_place(self, tmp_path: Path, monkeypatch) -> None:
        logger = tell(FileLogger(tmp_path), run())
        calls: list[tuple[str, int]] = []

        def fsync(descriptor: int) -> None:
            calls.append(("fsync", os.fstat(descriptor).st_size))

        def replace(move: Callable[[Path, Path], None], source: Path, target: Path) -> None:
            calls.append(("replace", source.stat().st_size))
            assert source.parent == target.parent
            move(source, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", partial(replace, os.replace))
        logger.load_state_dict(logger.state_dict())
        sizes = [len(files(tmp_path)[name]) for name in ("metrics.jsonl", "metrics.csv")]
        # The table can be made anew from the lines, so that it need not wait for the disk.
        assert calls == [("fsync", sizes[0]), ("replace", sizes[0]), ("replace", sizes[1])]


LOGS_UNTIL_KILLED = """
import itertools, json, sys
from etude.loggers import FileLogger

logger = FileLogger(sys.argv[1], rows_per_write=3)
for step in itertools.count(1):
    logger.log_metrics({"loss": 1 / step}, step)
    if step == 50:
        print(json.dumps(logger.state_dict()), flush=True)
    logger.log_metrics({f"part {step // 40}": step}, step)
    if step == 200:
        print("now", flush=True)
"""


def test_a_process_that_is_killed_leaves_what_a_resume_needs(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", LOGS_UNTIL_KILLED, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        state = json.loads(process.stdout.readline())
        assert process.stdout.readline() == "now\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    *lines, half = (folder / "metrics.jsonl").read_text().split("\n")
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) >= 197
    assert half == "" or f'{{"step": {len(lines) + 1}, '.startswith(half[:9])
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))[:-1]
    assert [int(row["step"]) for row in table] == list(range(1, len(table) + 1))

    def log_to(logger: FileLogger, first: int, last: int) -> None:
        for step in range(first, last + 1):
            logger.log_metrics({"loss": 1 / step}, step)
            logger.log_metrics({f"part {step // 40}": step}, step)
        logger.close(STATE, LOGGER)

    resumed, undisturbed = FileLogger(folder, append=True), FileLogger(tmp_path / "undisturbed")
    resumed.load_state_dict(state)
    log_to(resumed, 50, 300)
    log_to(undisturbed, 1, 300)
    assert files(folder) == files(tmp_path / "undisturbed")
