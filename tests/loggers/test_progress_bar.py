"""ProgressBar."""

import io
import math
from collections.abc import Callable
from contextlib import redirect_stderr
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from etude.engine import Logger, State, Time, Timestamp
from etude.loggers import InMemoryLogger, ProgressBar, progress_bar
from etude.trainer import Trainer
from helpers.networks import LinearModel, Stream, vectors


class Screen(io.StringIO):
    """Standard error of a terminal, or of a pipe."""

    def __init__(self, is_terminal: bool):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal

    def states_of_the_bar(self) -> list[str]:
        return [part for part in self.getvalue().split("\r") if "|" in part or "ba [" in part]

    def lines(self, beginning: str) -> list[str]:
        return [line for line in self.getvalue().splitlines() if line.startswith(beginning)]


@pytest.fixture
def terminal():
    yield Screen(is_terminal=True)
    assert not tqdm._instances, "a bar was left open"


@pytest.fixture
def pipe():
    return Screen(is_terminal=False)


@pytest.fixture
def clock(monkeypatch):
    """Lets that many seconds pass whenever the time is read."""

    def tick(seconds: float) -> None:
        readings = iter(range(10**6))
        monkeypatch.setattr(progress_bar, "time", SimpleNamespace(monotonic=lambda: seconds * next(readings)))

    return tick


def train(screen: Screen, data=None, eval_dataloader=None, max_duration="2ep", **arguments) -> Trainer:
    """6 batches per epoch, unless other data are given."""
    data = vectors(24, 4) if data is None else data
    with redirect_stderr(screen):
        trainer = Trainer(LinearModel(), data, eval_dataloader, max_duration, device="cpu", **arguments)
        trainer.fit()
        trainer.close()
    return trainer


class TestTerminal:
    def test_there_is_one_bar_per_epoch(self, terminal):
        train(terminal)
        states = terminal.states_of_the_bar()
        assert any(state.startswith("epoch 1/2: 100%") and " 6/6 " in state for state in states)
        assert any(state.startswith("epoch 2/2: 100%") and " 6/6 " in state for state in states)

    @pytest.mark.parametrize(("max_duration", "length"), [("4ba", 4), ("6ba", 6), ("10ba", 6), ("99sp", 6)])
    def test_the_bar_counts_the_batches_to_come(self, terminal, max_duration, length):
        train(terminal, max_duration=max_duration)
        first = [state for state in terminal.states_of_the_bar() if state.startswith("epoch 1: ")]
        assert first
        assert f" {length}/{length} " in first[-1]

    def test_the_last_bar_of_a_duration_in_batches_is_shorter(self, terminal):
        train(terminal, max_duration="8ba")
        assert terminal.states_of_the_bar()[-1].startswith("epoch 2: 100%")
        assert " 2/2 " in terminal.states_of_the_bar()[-1]

    def test_a_dataloader_without_length_has_a_bar_without_end(self, terminal):
        train(terminal, DataLoader(Stream(), 4))
        assert terminal.states_of_the_bar()[-1].startswith("epoch 2/2: 3ba [")

    def test_a_duration_in_batches_is_the_end_where_the_dataloader_has_none(self, terminal):
        train(terminal, DataLoader(Stream(), 4), max_duration="2ba")
        assert " 2/2 " in terminal.states_of_the_bar()[-1]

    def test_the_latest_loss_is_shown(self, terminal, clock):
        clock(seconds=1.0)
        trainer = train(terminal, max_duration="1ep")
        assert f"loss={trainer.state.loss.item():.4f}" in terminal.states_of_the_bar()[-1]

    def test_evaluation_results_are_shown_on_a_separate_line(self, terminal):
        trainer = train(terminal, eval_dataloader=vectors(8, 4), max_duration="1ep")
        (line,) = terminal.lines("epoch 1  batch 6")
        assert line.endswith(f"evaluation: loss {trainer.state.eval_metrics['loss/eval/total']:.4f}")

    def test_the_training_loss_beside_them_is_the_mean_of_the_epoch(self, terminal: Screen) -> None:
        kept = InMemoryLogger()
        train(terminal, vectors(22, 4), vectors(8, 4), "2ep", loggers=kept)  # the last batch has two rows
        losses = kept.get_timeseries("loss/train/total")["loss/train/total"]
        weights = np.array([4, 4, 4, 4, 4, 2]) / 22
        for epoch in (1, 2):
            (line,) = terminal.lines(f"epoch {epoch}  batch {6 * epoch}")
            mean = float(weights @ losses[6 * (epoch - 1) : 6 * epoch])
            assert float(line.split("training loss ")[1].split()[0]) == pytest.approx(mean, abs=5e-5)

    def test_an_evaluation_has_a_separate_bar(self, terminal: Screen) -> None:
        train(terminal, eval_dataloader=vectors(12, 4), max_duration="1ep")
        states = [state for state in terminal.states_of_the_bar() if "evaluation: " in state and "ba/s" in state]
        assert any(" 0/3 " in state for state in states)

    def test_samples_per_second_are_shown(self, terminal: Screen, clock: Callable[[float], None]) -> None:
        clock(1.0)
        train(terminal, max_duration="1ep")
        assert "samples/s=4" in terminal.states_of_the_bar()[-1]  # 4 samples in every second

    def test_an_exception_ends_the_bar(self, terminal):
        with pytest.raises(ValueError, match="a batch must be"):
            train(terminal, [*vectors(8, 4), "no batch"])
        assert " 2/3 " in terminal.states_of_the_bar()[-1]


class TestResumed:
    """A fit that begins after `done` of the 6 batches of the second epoch; EPOCH_START was before."""

    @staticmethod
    def fit(screen: Screen, done: int, max_duration: str) -> None:
        state = State(
            model=LinearModel(),
            max_duration=Time.from_timestring(max_duration),
            train_dataloader=vectors(24, 4),
            timestamp=Timestamp(1, 6 + done, 4 * (6 + done), done, 4 * done),
        )
        logger = Logger(state)
        with redirect_stderr(screen):
            bar = ProgressBar()
            bar.fit_start(state, logger)
            while not state.is_finished and state.timestamp.batch_in_epoch < 6:
                state.timestamp = state.timestamp.to_next_batch(4)
                bar.batch_end(state, logger)
            bar.fit_end(state, logger)

    @pytest.mark.parametrize("done", [1, 4, 5])
    def test_the_bar_of_a_resumed_epoch_starts_at_its_position(self, terminal: Screen, done: int) -> None:
        self.fit(terminal, done, "2ep")
        states = terminal.states_of_the_bar()
        assert states[0].startswith("epoch 2/2: ")
        assert f" {done}/6 " in states[0]
        assert " 6/6 " in states[-1]

    def test_a_duration_in_batches_is_the_end(self, terminal: Screen) -> None:
        self.fit(terminal, 2, "10ba")
        states = terminal.states_of_the_bar()
        assert " 2/4 " in states[0]
        assert " 4/4 " in states[-1]

    def test_between_epochs_the_bar_waits_for_the_epoch(self, terminal: Screen) -> None:
        self.fit(terminal, 0, "2ep")
        assert terminal.getvalue() == ""

    def test_without_a_terminal_there_is_no_bar(self, pipe: Screen) -> None:
        self.fit(pipe, 2, "2ep")
        assert pipe.getvalue() == ""


class TestNoTerminal:
    def test_there_is_no_bar(self, pipe):
        train(pipe, eval_dataloader=vectors(8, 4))
        assert pipe.getvalue()
        assert "\r" not in pipe.getvalue()

    def test_quick_epochs_print_their_evaluation_only(self, pipe):
        train(pipe, eval_dataloader=vectors(8, 4))
        assert len(pipe.getvalue().splitlines()) == 2
        assert len(pipe.lines("epoch 1  batch 6  training loss ")) == 1
        assert len(pipe.lines("epoch 2  batch 12  training loss ")) == 1

    def test_slow_batches_print_a_line_each(self, pipe, clock):
        clock(seconds=31.0)
        train(pipe, max_duration="1ep")
        printed = pipe.lines("epoch 1/1  batch ")
        assert [line.split()[3] for line in printed] == [f"{batch}/6" for batch in range(1, 7)]
        assert all(float(line.split()[5]) > 0 for line in printed)
        assert [line.split()[-1] for line in printed] == [f"{4 * batch / (31 * batch):.4g}" for batch in range(1, 7)]

    def test_lines_are_at_least_30_seconds_apart(self, pipe, clock):
        """The epoch starts after 12 seconds, batches end after 24, 36, 48, 60, 72 and 84."""
        clock(seconds=12.0)
        train(pipe, max_duration="6ba")
        assert [line.split()[3] for line in pipe.lines("epoch 1  batch ")] == ["2/6", "5/6"]

    @pytest.mark.parametrize("max_duration", ["1ep", "12sp"])
    def test_a_dataloader_without_length_counts_without_end(self, pipe, clock, max_duration):
        clock(seconds=31.0)
        train(pipe, DataLoader(Stream(), 4), max_duration=max_duration)
        assert [line.split()[3] for line in pipe.lines("epoch 1")] == ["1", "2", "3"]

    def test_a_standalone_evaluation_is_shown(self, pipe):
        with redirect_stderr(pipe):
            loss = Trainer(LinearModel(), eval_dataloader=vectors(8, 4), device="cpu").eval()["loss/eval/total"]
        assert pipe.getvalue() == f"epoch 0  batch 0  evaluation: loss {loss:.4f}\n"


def test_in_a_notebook_there_is_a_widget(monkeypatch: pytest.MonkeyPatch) -> None:
    class Widget(tqdm):
        """Stands for tqdm's class for notebooks, which needs a kernel."""

    Widget.__module__ = "tqdm.notebook"
    monkeypatch.setattr("tqdm.auto.tqdm", type("tqdm", (Widget,), {}))
    assert issubclass(ProgressBar()._bar_class, Widget)


@pytest.mark.parametrize("done", [2, 300])
def test_the_mean_loss_continues_in_a_resumed_run(done: int) -> None:
    losses = torch.rand(400, dtype=torch.float64)
    losses[7] = math.nan  # a step that was skipped
    logger = Logger(State(model=LinearModel()))

    def run(bar: ProgressBar, values: Tensor) -> None:
        state = State(model=LinearModel(), max_duration=Time.from_epoch(1), global_batch_num_samples=4)
        for value in values:
            bar.log_metrics({"loss/train/total": value}, 1)
            bar.batch_end(state, logger)

    unbroken, first, second = ProgressBar(), ProgressBar(), ProgressBar()
    run(unbroken, losses)
    run(first, losses[:done])
    second.load_state_dict(first.state_dict())
    run(second, losses[done:])
    expected = losses[losses.isfinite()].mean().item()
    assert unbroken._losses.mean() == pytest.approx(expected, rel=1e-12)
    assert second._losses.mean() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_without_progress_bar_nothing_is_printed(is_terminal):
    screen = Screen(is_terminal)
    train(screen, eval_dataloader=vectors(8, 4), progress_bar=False)
    assert screen.getvalue() == ""
