"""A training in which one process dies or hangs, started by test_dying.

Usage: dying.py FOLDER WHAT, where WHAT is "kill" or "stop" (rank 1 in the middle of step 5, unless it was
started again), "nothing", or "linger" (every step takes a while). Writes FOLDER/result.pt at the end.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from etude import Callback
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


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    trainer = make_trainer(
        save_folder=folder / "saved",
        save_interval="2ba",
        autoresume=True,
        dist_timeout=5.0 if what == "stop" else 60.0,
        callbacks=Die(what),
    )
    trainer.fit()
    if trainer.state.rank == 0:
        torch.save(result_of(trainer), folder / "result.pt")
