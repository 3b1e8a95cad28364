"""The command that measures on a GPU runs on a CPU with small settings."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import etude

SCRIPT = Path(etude.__file__).parent / "benchmarks/gpu.py"


@pytest.mark.slow
def test_small_settings_run_on_a_cpu() -> None:
    run = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| ([\d.]+) \|", run.stdout, flags=re.MULTILINE)
    names = {name for name, *_ in rows}
    assert names >= {
        "plain",
        "block",
        "sample",
        "timm's drop path",
        "the same blocks absent",
        "Trainer",
        "loop by hand",
    }
    assert names >= {"plain, compiled", "block, compiled"}
    assert all(float(ratio) > 0 for *_, ratio in rows)


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_it_says_so() -> None:
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=300)
    assert run.returncode == 2
    assert "there is no accelerator; --quick runs small networks on the CPU" in run.stderr
