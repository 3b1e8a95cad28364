"""SIGTERM and SIGINT stop a training after its step, with a checkpoint."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from etude.engine import Callback, Event
from etude.trainer import CheckpointSaver
from etude.trainer.signals import SignalListener, TrainingInterrupted
from helpers.resumable import NUM_STEPS, differences, make_trainer, rows_of
from helpers.resumable import fit as fit_trainer

SIGNALS = [signal.SIGTERM, signal.SIGINT]


class Send(Callback):
    """Sends this process a signal at one event of one step."""

    def __init__(self, number: int, step: int = 3, event: Event = Event.AFTER_FORWARD, times: int = 1) -> None:
        self.number, self.step, self.times = number, step, times
        setattr(self, event.value, self.send)

    def send(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def fit(**settings: Any) -> dict[str, Any]:
    return fit_trainer(make_trainer(**settings))


@pytest.fixture(autouse=True)
def handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Any]]:
    """Each test has handlers of its own, which must be there again at its end."""
    monkeypatch.chdir(tmp_path)

    def handler(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(f"signal {number}")

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    yield dict.fromkeys(SIGNALS, handler)
    after = {number: signal.signal(number, before[number]) for number in SIGNALS}
    assert after == dict.fromkeys(SIGNALS, handler)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return fit()


class TestASignal:
    @pytest.mark.parametrize("number", SIGNALS)
    @pytest.mark.parametrize(
        "event", [Event.BATCH_START, Event.AFTER_FORWARD, Event.AFTER_BACKWARD, Event.AFTER_DATALOADER]
    )
    def test_finishes_the_step_and_saves_and_the_end_is_the_same(
        self, expected: dict[str, Any], number: int, event: Event
    ) -> None:
        with pytest.raises(TrainingInterrupted) as caught:
            fit(save_folder="saved", callbacks=Send(number, event=event), run_name="run")
        assert caught.value.code == 128 + number
        assert caught.value.signal_number == number
        assert str(caught.value) == f"training was stopped by {signal.Signals(number).name}; it can be resumed"
        assert sorted(os.listdir("saved")) == ["ep0-ba0.pt", "ep0-ba4.pt", "latest"]
        assert differences(expected, fit(save_folder="saved", autoresume=True, run_name="run")) == []
        assert [row["step"] for row in rows_of(Path("runs/run"))] == list(range(1, NUM_STEPS + 1))

    def test_at_the_end_of_a_step_ends_training_there(self, expected: dict[str, Any]) -> None:
        with pytest.raises(TrainingInterrupted):
            fit(save_folder="saved", callbacks=Send(signal.SIGTERM, 3, Event.BATCH_END))
        assert Path("saved/latest").read_text() == "ep0-ba3.pt\n"
        assert differences(expected, fit(save_folder="saved", autoresume=True)) == []

    def test_in_the_last_step_of_an_epoch_leaves_the_end_of_the_epoch_to_the_resumed_run(
        self, expected: dict[str, Any]
    ) -> None:
        with pytest.raises(TrainingInterrupted):
            fit(save_folder="saved", callbacks=Send(signal.SIGTERM, 4))
        assert Path("saved/latest").read_text() == "ep0-ba5.pt\n"
        assert differences(expected, fit(save_folder="saved", autoresume=True)) == []

    def test_saves_no_moment_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        written = []
        replace = os.replace
        monkeypatch.setattr("os.replace", lambda old, new: (written.append(Path(new).name), replace(old, new))[1])
        with pytest.raises(TrainingInterrupted):
            fit(save_folder="saved", save_interval="1ba", callbacks=Send(signal.SIGTERM))
        assert [name for name in written if name.endswith(".pt")] == [f"ep0-ba{number}.pt" for number in range(5)]

    def test_works_with_a_saver_among_the_callbacks(self) -> None:
        with pytest.raises(TrainingInterrupted):
            fit(callbacks=[Send(signal.SIGTERM), CheckpointSaver("saved")])
        assert Path("saved/latest").read_text() == "ep0-ba4.pt\n"

    def test_closes_callbacks_and_loggers(self) -> None:
        closed = []

        class Close(Callback):
            def close(self, state: Any, logger: Any) -> None:
                closed.append(state.timestamp.batch)

        with pytest.raises(TrainingInterrupted):
            fit(save_folder="saved", callbacks=[Send(signal.SIGTERM), Close()])
        assert closed == [4]

    def test_signals_are_not_handled_without_a_saver(self, handlers: dict[int, Any]) -> None:
        seen: list[Any] = []

        class Look(Callback):
            def batch_start(self, state: Any, logger: Any) -> None:
                seen.append([signal.getsignal(number) for number in SIGNALS])

        fit(callbacks=Look(), max_duration="1ba")
        assert seen == [list(handlers.values())]
        with pytest.raises(KeyboardInterrupt, match="signal 15"):
            fit(callbacks=Send(signal.SIGTERM))

    def test_that_comes_twice_acts_as_without_the_trainer(self) -> None:
        with pytest.raises(KeyboardInterrupt, match="signal 2"):
            fit(save_folder="saved", callbacks=Send(signal.SIGINT, times=2))
        assert sorted(os.listdir("saved")) == ["ep0-ba0.pt", "latest"]

    def test_other_signals_are_not_handled(self) -> None:
        seen = []
        before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
        try:
            fit(save_folder="saved", callbacks=Send(signal.SIGUSR1), max_duration="5ba")
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert seen == [signal.SIGUSR1]

    def test_of_an_earlier_fit_is_forgotten(self, expected: dict[str, Any]) -> None:
        listener = SignalListener()
        with listener:
            os.kill(os.getpid(), signal.SIGTERM)
        assert listener.received == signal.SIGTERM
        with listener:
            assert listener.received == 0


class TestHandlers:
    """That they are those of before after each test is checked by the fixture; these end in other ways."""

    def test_are_put_back_after_a_training_that_reached_its_end(self) -> None:
        fit(save_folder="saved", max_duration="1ba")

    def test_are_put_back_after_an_exception(self) -> None:
        class Fail(Callback):
            def after_loss(self, state: Any, logger: Any) -> None:
                raise OverflowError

        with pytest.raises(OverflowError):
            fit(save_folder="saved", callbacks=Fail())

    def test_are_not_asked_for_in_another_thread(self, expected: dict[str, Any]) -> None:
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(fit(save_folder="saved")))
        thread.start()
        thread.join()
        assert len(results) == 1
        assert differences(expected["model"], results[0]["model"]) == []


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from etude.engine import Callback
from helpers.resumable import make_trainer, result_of

folder, mode, step, num_workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
os.chdir(folder)

class Disturb(Callback):
    def after_forward(self, state, logger):
        if state.timestamp.batch == step and mode != "nothing":
            if mode == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            Path("ready").touch()
            while not Path("sent").exists():
                time.sleep(0.01)
                if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                    Path("noted").touch()

torch.set_num_threads(1)
trainer = make_trainer(save_folder="saved", save_interval="3ba", autoresume=True, run_name="run",
                       callbacks=Disturb(), num_workers=num_workers)
trainer.fit()
torch.save(result_of(trainer), "result.pt")
"""


def start(folder: Path, mode: str, step: int = 0, num_workers: int = 0) -> subprocess.Popen:
    """A training in a process group of its own."""
    folder.mkdir(exist_ok=True)
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    return subprocess.Popen(
        [sys.executable, "-c", script, folder, mode, str(step), str(num_workers)],
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


def end(process: subprocess.Popen) -> str:
    """Its standard error, when it has ended."""
    try:
        return process.communicate(timeout=100)[1].decode()
    finally:
        process.kill()


def signal_group(folder: Path, process: subprocess.Popen, *numbers: int) -> None:
    """Signal the process and its loader workers in the middle of a step, each time when it has noted the last one."""
    for number, sign in zip(numbers, ("ready", "noted"), strict=False):
        while not (folder / sign).exists():
            assert process.poll() is None, end(process)
            time.sleep(0.01)
        os.killpg(process.pid, number)
    (folder / "sent").touch()


@pytest.mark.slow
def test_interrupted_or_killed_processes_resume_to_the_same_result(tmp_path: Path) -> None:
    """Those that are not in each other's way run at the same time, since to start one takes seconds."""
    undisturbed = start(tmp_path / "undisturbed", "nothing")
    killed = start(tmp_path / "killed", "SIGKILL", torch.randint(1, NUM_STEPS, ()).item())
    signalled = {name: tmp_path / name for name in ("SIGTERM", "SIGINT", "twice")}
    processes = {name: start(folder, name, 4, num_workers=2) for name, folder in signalled.items()}
    signal_group(signalled["SIGTERM"], processes["SIGTERM"], signal.SIGTERM)
    signal_group(signalled["SIGINT"], processes["SIGINT"], signal.SIGINT)
    signal_group(signalled["twice"], processes["twice"], signal.SIGINT, signal.SIGINT)
    assert end(undisturbed) == ""
    assert end(killed) == ""
    errors = {name: end(process) for name, process in processes.items()}
    assert (undisturbed.returncode, killed.returncode) == (0, -signal.SIGKILL)
    assert {name: process.returncode for name, process in processes.items()} == {
        "SIGTERM": 143,
        "SIGINT": 130,
        "twice": -signal.SIGINT,
    }, errors
    for name in ("SIGTERM", "SIGINT"):
        assert "Traceback" not in errors[name]
        assert (signalled[name] / "saved" / "latest").read_text() == "ep0-ba5.pt\n"
    assert errors["twice"].rstrip().endswith("KeyboardInterrupt")
    assert (signalled["twice"] / "saved" / "latest").read_text() == "ep0-ba3.pt\n"

    folders = [tmp_path / "killed", *signalled.values()]
    for process in [start(folder, "nothing") for folder in folders]:
        assert end(process) == ""
        assert process.returncode == 0
    whole = torch.load(tmp_path / "undisturbed" / "result.pt", weights_only=False)
    for folder in folders:
        result = torch.load(folder / "result.pt", weights_only=False)
        assert differences(whole, result) == [], folder
        assert rows_of(folder / "runs" / "run") == rows_of(tmp_path / "undisturbed" / "runs" / "run"), folder
        assert [row["step"] for row in rows_of(folder / "runs" / "run")] == list(range(1, NUM_STEPS + 1))
