"""A test that leaves something behind fails."""

from pathlib import Path

import pytest

from helpers import leaks

LEAKING_TESTS = """
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist

stop = threading.Event()

def test_thread():
    threading.Thread(target=stop.wait, daemon=True).start()

def teardown_module():
    stop.set()

def test_child_process():
    os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "100")

def test_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

def test_environment_variable():
    os.environ["LEAKED"] = "1"
    os.environ["HOME"] = "/nowhere"

def test_removed_environment_variable():
    del os.environ["PATH"]

def test_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)

def test_cudnn_benchmark():
    torch.backends.cudnn.benchmark = True

def test_default_dtype():
    torch.set_default_dtype(torch.float64)

def test_number_of_threads():
    torch.set_num_threads(torch.get_num_threads() + 1)

def test_grad_mode():
    torch.set_grad_enabled(False)

def test_signal_handler():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def test_working_directory():
    os.chdir("/")

def test_file():
    open("leaked.txt", "w").close()

def test_directory():
    os.makedirs("leaked/deep")
"""
LEAKS = {
    "thread": r"threads: <Thread\(.*",
    "child_process": r"child processes: \d+",
    "process_group": "a process group: False -> True",
    "environment_variable": "environment variables: HOME: '.*' -> '/nowhere', LEAKED: None -> '1'",
    "removed_environment_variable": "environment variables: PATH: '.*' -> None",
    "deterministic_algorithms": r"settings of torch: deterministic algorithms: \(False, False\) -> \(True, False\)",
    "cudnn_benchmark": "settings of torch: cudnn.benchmark: False -> True",
    "default_dtype": "settings of torch: default dtype: torch.float32 -> torch.float64",
    "number_of_threads": "settings of torch: number of threads: 1 -> 2",
    "grad_mode": "settings of torch: grad mode: True -> False",
    "signal_handler": "signal handlers: SIGTERM: .* -> <Handlers.SIG_IGN: 1>",
    "working_directory": "the working directory: '.*' -> '/'",
    "file": "files in the working directory: leaked.txt",
    "directory": "files in the working directory: leaked",
}
CLEAN_TESTS = """
import random
import numpy as np
import torch

def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()

first = None

def test_one():
    global first
    first = draws()

def test_another():
    assert draws() == first
"""


def run(pytester: pytest.Pytester, tests: str) -> pytest.RunResult:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile(tests)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist")


def test_every_leak_fails_the_test_that_causes_it(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "SECONDS_TO_END", 0.05)
    result = run(pytester, LEAKING_TESTS)
    result.assert_outcomes(passed=len(LEAKS), errors=len(LEAKS))
    for name, leak in LEAKS.items():
        result.stdout.re_match_lines([f".* ERROR at teardown of test_{name} .*", f"the test leaks {leak}$"])


def test_tests_without_leaks_pass_and_start_from_the_same_random_state(pytester: pytest.Pytester) -> None:
    run(pytester, CLEAN_TESTS).assert_outcomes(passed=2)
