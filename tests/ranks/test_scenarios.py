"""Two processes train together; they are started once for all scenarios, since starting is what takes time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import scenarios


def test_two_ranks(tmp_path: Path, subtests: pytest.Subtests) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, Path(scenarios.__file__), tmp_path], capture_output=True, text=True, timeout=300, check=False
    )
    assert (tmp_path / "results.json").exists(), done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(scenarios.SCENARIOS) > 15
    for scenario in scenarios.SCENARIOS:
        with subtests.test(scenario.__name__):
            errors = results.get(scenario.__name__, [f"did not run: {done.stderr[-3000:]}"])
            assert errors == [None, None], "\n".join(error for error in errors if error)
