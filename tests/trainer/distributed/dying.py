"""A training in which one process dies or hangs, started by test_dying.

Usage: dying.py FOLDER WHAT, where WHAT is "kill" or "stop" (rank 1 in the middle of step 5, unless it was
started again), "nothing", "linger" (every step takes a while), "logger" (that of rank 0 raises an error), "metric" (of
rank 1), or an event, at which a callback of rank 1 raises an error. Writes FOLDER/result.pt at the end.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from etude import Callback, Event, LoggerDestination
from helpers.resumable import make_trainer, result_of

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Die(Callback):
    """Sends rank 1 a signal that it cannot answer, the first time."""

    def __init__(self, what: str) -> None:
        self.signal = SIGNALS.get(what)
        self.pause = 0.4 if what == "linger" else 0.0

    def batch_start(self, state: Any, logger: Any) -> None:
        time.sleep(self.pause)

    def after_forward(self, state: Any, logger: Any) -> None:
        is_first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if self.signal and is_first_start and state.rank == 1 and state.timestamp.batch == 5:
            os.kill(os.getpid(), self.signal)


class Fail(Callback):
    """Raises at an event on rank 1, when five steps are done."""

    def __init__(self, event: str) -> None:
        self.event = event

    def run_event(self, event: Event, state: Any, logger: Any) -> None:
        if event.value == self.event and state.rank == 1 and state.timestamp.batch >= 5:
            raise ArithmeticError(f"at {self.event}")


class BadLogger(LoggerDestination):
    """Refuses what is logged, when five steps are done."""

    def log_metrics(self, metrics: Any, step: int) -> None:
        if step > 5:
            raise ValueError("refused by the logger")


def spoil_metric(model: Any) -> None:
    update = model.update_metric

    def fail(batch: Any, outputs: Any, metric: Any) -> None:
        if int(os.environ["RANK"]) == 1:
            raise ArithmeticError("in a metric")
        update(batch, outputs, metric)

    model.update_metric = fail


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    trainer = make_trainer(
        save_folder=folder / "saved",
        save_interval="2ba",
        autoresume=True,
        dist_timeout=5.0 if what == "stop" else 60.0,
        callbacks=[Die(what), *([Fail(what)] if what in {event.value for event in Event} else [])],
        loggers=BadLogger() if what == "logger" else (),
    )
    if what == "metric":
        spoil_metric(trainer.state.model)
    trainer.fit()
    if trainer.state.rank == 0:
        torch.save(result_of(trainer), folder / "result.pt")
