"""Runs that are killed at random times and resumed."""

import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 200


@pytest.mark.slow
def test_a_run_that_is_killed_200_times_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("chaos.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(KILLS), "0"], capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills, in_saves, finished = map(int, done.stdout.split())
    assert kills == KILLS
    assert in_saves > KILLS / 10, "many must fall into a save"
    assert finished > KILLS / 10, "and many runs must come to their end"
