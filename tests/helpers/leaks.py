"""Detection of threads, processes, files and settings that a test leaves behind."""

import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

SECONDS_TO_END = 2.0  # for threads and processes that were told to end
LIBRARIES_SET = {
    "KMP_DUPLICATE_LIB_OK",  # set by scikit-learn
    "KMP_INIT_AT_FORK",  # set by scikit-learn
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
}


def snapshot() -> dict[str, Any]:
    """The present state of every kind."""
    return {name: kind.read() for name, kind in KINDS.items()}


def restore(before: dict[str, Any]) -> list[str]:
    """Set back what differs from a snapshot, and describe it."""
    leaks = []
    for name, kind in KINDS.items():
        if difference := _wait_for_end(kind, before[name]):
            kind.restore(before[name])
            leaks.append(f"{name}: {difference}")
    return leaks


class Kind(NamedTuple):
    """How one kind of state is read, and how it is set back. What ends by itself is given time to do so."""

    read: Callable[[], Any]
    restore: Callable[[Any], object]
    ends_by_itself: bool = False


def _wait_for_end(kind: Kind, before: Any) -> str:
    """How the state differs from that before, empty if it does not."""
    difference = _difference(before, kind.read())
    if difference and kind.ends_by_itself:
        gc.collect()  # loaders end their workers when they are collected
        deadline = time.monotonic() + SECONDS_TO_END
        while (difference := _difference(before, kind.read())) and time.monotonic() < deadline:
            time.sleep(0.01)
    return difference


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, set):
        return ", ".join(sorted(map(str, after - before)))
    if isinstance(before, dict):
        changed = [name for name in before | after if before.get(name) != after.get(name)]
        return ", ".join(f"{name}: {before.get(name)!r} -> {after.get(name)!r}" for name in sorted(changed))
    return "" if before == after else f"{before!r} -> {after!r}"


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"}  # tqdm keeps one


def _child_processes() -> set[int]:
    tasks = Path("/proc/self/task")
    if tasks.exists():
        children = {pid for task in tasks.iterdir() for pid in _children_of(task)}
    else:
        children = {child.pid for child in multiprocessing.active_children() if child.pid is not None}
    # Python starts these at most once and keeps them.
    kept = {
        getattr(resource_tracker._resource_tracker, "_pid", None),
        getattr(forkserver._forkserver, "_forkserver_pid", None),
    }
    return children - kept


def _children_of(task: Path) -> list[int]:
    try:
        return [int(pid) for pid in (task / "children").read_text().split()]
    except FileNotFoundError:  # the thread has ended meanwhile
        return []


def _kill_child_processes(before: set[int]) -> None:
    for pid in _child_processes() - before:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _destroy_process_group(before: bool) -> None:
    if not before:
        dist.destroy_process_group()


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in LIBRARIES_SET}


def _restore_environment(before: dict[str, str]) -> None:
    for name in _environment().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "deterministic algorithms": (
        _deterministic,
        lambda before: torch.use_deterministic_algorithms(before[0], warn_only=before[1]),
    ),
    "cudnn.deterministic": (
        lambda: torch.backends.cudnn.deterministic,
        lambda before: setattr(torch.backends.cudnn, "deterministic", before),
    ),
    "cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda before: setattr(torch.backends.cudnn, "benchmark", before),
    ),
    "float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, lambda before: torch.set_default_device(None)),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
}


def _settings() -> dict[str, Any]:
    return {name: read() for name, (read, _) in _SETTINGS.items()}


def _restore_settings(before: dict[str, Any]) -> None:
    for name, (read, restore) in _SETTINGS.items():
        if read() != before[name]:
            restore(before[name])


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)


def _signal_handlers() -> dict[str, Any]:
    return {number.name: signal.getsignal(number) for number in _SIGNALS}


def _restore_signal_handlers(before: dict[str, Any]) -> None:
    for number in _SIGNALS:
        signal.signal(number, before[number.name])


def _files() -> set[str]:
    return set(os.listdir())


def _remove_files(before: set[str]) -> None:
    for name in _files() - before:
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


KINDS = {
    "threads": Kind(_threads, lambda before: None, ends_by_itself=True),
    "child processes": Kind(_child_processes, _kill_child_processes, ends_by_itself=True),
    "a process group": Kind(dist.is_initialized, _destroy_process_group),
    "environment variables": Kind(_environment, _restore_environment),
    "settings of torch": Kind(_settings, _restore_settings),
    "signal handlers": Kind(_signal_handlers, _restore_signal_handlers),
    "the working directory": Kind(os.getcwd, os.chdir),
    "files in the working directory": Kind(_files, _remove_files),
}
