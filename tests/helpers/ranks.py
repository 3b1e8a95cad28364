"""The decorator `on_ranks` for tests on several ranks.

A test function becomes one by the decorator::

    @on_ranks(2)
    @pytest.mark.parametrize("method", ["block", "sample"])
    def test_all_ranks_have_the_same_weights(method: str, tmp_path: Path) -> None:
        model = ...             # runs on both ranks, in one gloo process group on CPUs
        assert_same_on_all_ranks(model)

It is an ordinary test for pytest, which fails with the errors of all ranks. Its arguments are pickled, so fixtures
must be plain values, like ``tmp_path``, which is the same folder on all ranks. Every such test has processes of its
own: they are forked in a tenth of a second from a server that has imported torch, once per pytest worker. A rank that
hangs is killed after the test's timeout, and its stack is printed. To use the results of ranks in an ordinary test,
call `run_on_ranks`.
"""

import faulthandler
import functools
import importlib.util
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

TIMEOUT = 90.0
SECONDS_AFTER_AN_ERROR = 5.0  # for the other ranks, which usually wait for the one that failed
IMPORTED_ONCE = [
    "pytest",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torchmetrics.classification",
    "torchvision.models",
    "etude.algorithms",
    "etude.functional",
    "etude.models",
    "etude.trainer",
]


def on_ranks(num_ranks: int, timeout: float = TIMEOUT) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test function on that many ranks. All of them must pass within `timeout` seconds."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.xdist_group("ranks")
        @functools.wraps(test)
        def run(**arguments: Any) -> None:
            run_on_ranks(num_ranks, test, timeout=timeout, **arguments)

        return run

    return decorate


def run_on_ranks(num_ranks: int, function: Callable[..., Any], timeout: float = TIMEOUT, **arguments: Any) -> list[Any]:
    """Call a function of a test module on that many ranks, and return the value of each.

    Fails the running test if a rank fails, dies or is not done after `timeout` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    file, name = function.__code__.co_filename, function.__qualname__
    if not name.isidentifier():
        raise TypeError(f"ranks can only call functions at the top of a module, got {name}")
    with TemporaryDirectory() as folder:
        connections, processes = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            launch = (theirs, rank, num_ranks, folder, file, name, arguments)
            process = context.Process(target=_run_rank, args=launch)
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
        try:
            results = _collect(connections, timeout)
            if all(status == "returned" for status, _ in results):
                for connection in connections:
                    connection.send("leave")
        finally:
            for process, connection in zip(processes, connections, strict=True):
                _end(process)
                connection.close()
    errors = [f"rank {rank} {status}\n{text}" for rank, (status, text) in enumerate(results) if status != "returned"]
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)
    return [value for _, value in results]


def _collect(connections: list[Connection], timeout: float) -> list[tuple[str, Any]]:
    """For each rank what became of it, and what it returned or the error."""
    results = [(f"was not done after {timeout:g} s; its stack is in the captured stderr", "")] * len(connections)
    pending = list(connections)
    deadline = time.monotonic() + timeout
    while pending and (seconds := deadline - time.monotonic()) > 0:
        ready: list[Any] = wait(pending, seconds)
        for connection in ready:
            rank = connections.index(connection)
            pending.remove(connection)
            try:
                results[rank] = connection.recv()
            except EOFError:
                results[rank] = ("died", "")
            if results[rank][0] != "returned":
                deadline = min(deadline, time.monotonic() + SECONDS_AFTER_AN_ERROR)
    return results


def _end(process: Any) -> None:
    process.join(timeout=1)
    if process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)
        process.join(timeout=1)
        process.kill()
        process.join()
    process.close()


def _run_rank(
    connection: Connection, rank: int, num_ranks: int, folder: str, file: str, name: str, arguments: dict[str, Any]
) -> None:
    """The life of one rank."""
    faulthandler.register(signal.SIGUSR1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    try:
        store = dist.FileStore(f"{folder}/store", num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
        value = _function(file, name)(**arguments)
    except BaseException:
        connection.send(("failed", traceback.format_exc()))
        return
    connection.send(("returned", value))
    connection.recv()  # until all ranks are done, since they may still need this one
    dist.destroy_process_group()


def _function(file: str, name: str) -> Callable[..., Any]:
    """The function of a test module without the decorator."""
    module_name = Path(file).stem
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return getattr(function, "__wrapped__", function)
