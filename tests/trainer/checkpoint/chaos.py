"""A training that is killed at random times, started by test_chaos.

Usage: chaos.py FOLDER KILLS SEED. Every process is a fork, since starting python is what takes time; the writer
of checkpoints is slowed so that many kills fall into a save. Prints how many did.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from etude.trainer.checkpoint import file, saver
from etude.trainer.checkpoint.folder import newest_good
from helpers.resumable import differences, make_trainer, result_of

SECONDS_PER_PAUSE = 0.002


def slow_writer() -> None:
    """Pause at every stage of a save: half written, unsealed, not synced, not renamed, renamed but not pointed to."""

    def paused(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(SECONDS_PER_PAUSE)
            return function(*args, **kwargs)

        return call

    file._seal = paused(file._seal)
    saver.set_pointer = paused(saver.set_pointer)
    # A killed process leaves to the system what it has written, so there is no need to wait for the disk.
    without_disk = {"fsync": paused(lambda file: None), "replace": paused(os.replace)}
    cast(Any, file).os = type("os", (), dict(vars(os), **without_disk))


def train(folder: Path, run: str) -> None:
    """Train from where the folder's checkpoints end, in a process of its own, and write the result."""
    os.chdir(folder)
    trainer = make_trainer(save_folder="saved", save_interval="1ba", autoresume=True, run_name=run, max_duration="6ba")
    trainer.fit()
    trainer.close()
    torch.save(result_of(trainer), "result.tmp")
    os.replace("result.tmp", "result.pt")


def fork(folder: Path, run: str) -> int:
    """The number of a new process that trains."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            train(folder, run)
            status = 0
        finally:
            os._exit(status)
    return pid


def main(folder: Path, num_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    slow_writer()
    random.seed(seed)
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    undisturbed.mkdir()
    make_trainer(max_duration="1ba").fit()  # what is loaded late is loaded now, and not by every process
    started = time.monotonic()
    assert os.waitpid(fork(undisturbed, "run"), 0)[1] == 0
    seconds = time.monotonic() - started
    expected = torch.load(undisturbed / "result.pt", weights_only=False)
    steps = (undisturbed / "runs" / "run" / "metrics.jsonl").read_text().count("\n")

    kills = in_saves = finished = 0
    while kills < num_kills:
        disturbed.mkdir(exist_ok=True)
        pid = fork(disturbed, "run")
        time.sleep(random.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and not (disturbed / "result.pt").exists():
            kills += 1
            in_saves += any((disturbed / "saved").glob(".*.tmp"))
            newest_good(disturbed / "saved")  # raises if there are checkpoints and none of them is good
            continue
        assert os.WIFSIGNALED(status) or status == 0, status
        found = torch.load(disturbed / "result.pt", weights_only=False)
        assert differences(expected, found) == []
        assert (disturbed / "runs" / "run" / "metrics.jsonl").read_text().count("\n") == steps
        shutil.rmtree(disturbed)
        finished += 1
    print(kills, in_saves, finished)


if __name__ == "__main__":
    import logging

    logging.disable(logging.WARNING)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
