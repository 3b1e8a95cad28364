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


@pytest.mark.parametrize("what", ["kill", pytest.param("stop", marks=pytest.mark.slow)])
def test_the_other_rank_ends_with_a_clear_error(tmp_path: Path, what: str) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, tmp_path, what],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        _, message = processes[0].communicate(timeout=100)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
    assert processes[0].returncode not in (0, -signal.SIGKILL)
    assert "RankLostError: rank 0 of 2 got no answer: another process of this training has ended or hangs" in message
    assert (tmp_path / "saved" / "latest").read_text() == "ep0-ba4.pt\n"
