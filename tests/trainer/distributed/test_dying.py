"""Ranks that die or hang, and restarts by torchrun."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.resumable import differences

SCRIPT = Path(__file__).with_name("dying.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def wait_for(path: Path) -> None:
    """Until a file is there."""
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


def torchrun(folder: Path, what: str, *options: str) -> dict:
    """Run the training under torchrun to its end."""
    folder.mkdir(exist_ok=True)
    command = [*TORCHRUN, *options, SCRIPT, folder, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert (folder / "result.pt").exists(), done.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=False)


@pytest.mark.slow
def test_killed_or_stopped_ranks_resume_to_the_result_of_an_uninterrupted_run(tmp_path: Path) -> None:
    undisturbed = torchrun(tmp_path / "undisturbed", "nothing", "--nproc-per-node", "2")
    restarted = torchrun(tmp_path / "killed", "kill", "--nproc-per-node", "2", "--max-restarts", "1")
    assert differences(undisturbed, restarted) == []

    folder = tmp_path / "stopped"
    folder.mkdir()
    command = [*TORCHRUN, "--nproc-per-node", "2", SCRIPT, folder, "linger"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_for(folder / "saved" / "latest")
        process.send_signal(signal.SIGTERM)  # which torchrun hands on to both ranks
        assert process.wait(timeout=60) != 0
    assert not (folder / "result.pt").exists()
    assert int(re.findall(r"ba(\d+)", (folder / "saved" / "latest").read_text())[0]) > 0, "a step was saved"
    assert differences(undisturbed, torchrun(folder, "nothing", "--nproc-per-node", "2")) == []


@pytest.mark.slow
def test_one_process_under_torchrun_is_bit_identical_to_one_without(tmp_path: Path) -> None:
    under = torchrun(tmp_path / "under", "nothing", "--nproc-per-node", "1")
    (tmp_path / "without").mkdir()
    subprocess.run([sys.executable, SCRIPT, tmp_path / "without", "nothing"], check=True, capture_output=True)
    without = torch.load(tmp_path / "without" / "result.pt", weights_only=False)
    assert differences(under, without) == []


def run_two_ranks(folder: Path, what: str) -> tuple[list[int], list[str]]:
    """The exit codes and the messages of both ranks, each as long as it lives by itself."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder, what],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    waited_for = processes[:1] if what == "stop" else processes  # one that hangs does not end
    try:
        messages = [process.communicate(timeout=100)[1] for process in waited_for]
        codes = [process.returncode for process in waited_for]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
    return codes, messages


LOST = "RankLostError: rank {} of 2 got no answer: another process of this training has ended or hangs"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill", "stop"])
def test_the_other_rank_ends_with_a_clear_error(tmp_path: Path, what: str) -> None:
    codes, messages = run_two_ranks(tmp_path, what)
    assert codes[0] not in (0, -signal.SIGKILL)
    assert LOST.format(0) in messages[0]
    assert (tmp_path / "saved" / "latest").read_text() == "ep0-ba4.pt\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("batch_end", "ArithmeticError: at batch_end"),
        ("after_loss", "ArithmeticError: at after_loss"),
        ("epoch_end", "ArithmeticError: at epoch_end"),
        ("eval_batch_end", "ArithmeticError: at eval_batch_end"),
        ("eval_end", "ArithmeticError: at eval_end"),
        ("fit_end", "ArithmeticError: at fit_end"),
        ("metric", "ArithmeticError: in a metric"),
        ("logger", "ValueError: refused by the logger"),
    ],
)
def test_an_error_of_one_rank_ends_both_and_a_restart_resumes(tmp_path: Path, what: str, error: str) -> None:
    """An error in a callback, a metric, a logger or an evaluation."""
    failing = 0 if what == "logger" else 1
    codes, messages = run_two_ranks(tmp_path, what)
    assert error in messages[failing]
    assert codes[failing] != 0
    if what != "fit_end":  # where the other rank has nothing to wait for
        assert codes[1 - failing] != 0
        assert LOST.format(1 - failing) in messages[1 - failing]
    saved = (tmp_path / "saved" / "latest").read_text()
    assert saved in ("ep0-ba4.pt\n", "ep0-ba5.pt\n", "ep1-ba5.pt\n", "ep2-ba10.pt\n", "ep1-ba10.pt\n"), saved
    codes, messages = run_two_ranks(tmp_path, "nothing")
    assert codes == [0, 0], messages
    assert (tmp_path / "result.pt").exists()
