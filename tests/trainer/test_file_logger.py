import csv
import json
import math

import pytest
import torch
from torch import nn

from etude.engine import Algorithm, Event, Logger, State
from etude.trainer import FileLogger, Trainer
from networks import LinearModel, vectors

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


class TestRows:
    def test_what_is_logged_at_one_step_is_one_row(self, tmp_path):
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
    def test_what_json_cannot_say_is_null(self, tmp_path, value, kind):
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

    def test_closing_without_rows_writes_nothing(self, tmp_path):
        FileLogger(tmp_path / "run").close(STATE, LOGGER)
        assert list(tmp_path.iterdir()) == []


class TestFolder:
    def test_it_is_made_when_the_first_row_comes(self, tmp_path):
        folder = tmp_path / "runs" / "mine"
        logger = FileLogger(folder)
        assert list(tmp_path.iterdir()) == []
        logger.log_metrics({"loss": 0.5}, 1)
        logger.close(STATE, LOGGER)
        assert json_rows(folder) == [{"step": 1, "loss": 0.5}]

    def test_one_that_holds_metrics_is_refused_and_stays_as_it_is(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text("earlier\n")
        with pytest.raises(FileExistsError, match="must not hold metrics of another run, got") as caught:
            FileLogger(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert (tmp_path / "metrics.jsonl").read_text() == "earlier\n"

    @pytest.mark.parametrize("rows", [0, -1])
    def test_a_group_of_no_rows_is_refused(self, tmp_path, rows):
        with pytest.raises(ValueError, match=f"rows_per_write must be at least 1, got {rows}"):
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
        assert [row["step"] for row in rows if "time/epoch" in row] == [3, 6]

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

    def test_a_loss_that_is_not_a_number_is_null(self, trainer, tmp_path):
        def diverge(state, logger):
            state.loss = state.loss * float("nan")

        trainer(Do(Event.AFTER_LOSS, diverge, from_batch=3)).fit()
        losses = [row["loss/train/total"] for row in json_rows(tmp_path)]
        assert len(losses) == 6
        assert None not in losses[:3]
        assert losses[3:] == [None] * 3

    def test_what_was_logged_before_an_exception_is_written(self, trainer, tmp_path):
        def fail(state, logger):
            raise OSError("gone")

        with pytest.raises(OSError, match="gone"):
            trainer(Do(Event.BATCH_START, fail, from_batch=5)).fit()
        assert [row["step"] for row in json_rows(tmp_path)] == [1, 2, 3, 4, 5]
