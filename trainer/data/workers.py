"""The processes that load data: they outlive the signals that end a run, and are ended with it."""

import atexit
import signal
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch.utils.data import get_worker_info

from ..torch_internals import shut_down_workers, worker_processes


class WorkerInit:
    """Makes a worker ignore the signals that end a run, as the step that they find running needs its batch."""

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        self._worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        info: Any = get_worker_info()
        own = getattr(info.dataset, "user_dataset", None)
        if own is not None:  # user code looks here for its own dataset; the info is frozen
            object.__setattr__(info, "dataset", own)
        if self._worker_init_fn is not None:
            self._worker_init_fn(worker_id)


def tracked(iterator: Iterator[Any]) -> Iterator[Any]:
    """Make sure that workers of an iterator which is still open when python exits are ended."""
    if worker_processes(iterator):
        _open_iterators.add(iterator)
        _end_workers_at_exit()
    return iterator


def end_workers(iterator: Any) -> None:
    """End the workers of a DataLoader's iterator, if it has any. To be killed is all they do not ignore."""
    if workers := worker_processes(iterator):
        shut_down_workers(iterator)
        for worker in workers:
            if worker.is_alive():
                worker.kill()


def _end_all_workers() -> None:
    for iterator in tuple(_open_iterators):
        end_workers(iterator)


@cache
def _end_workers_at_exit() -> None:
    # multiprocessing waits at exit, for ever, for workers that ignore being terminated. What is registered last is
    # called first.
    atexit.register(_end_all_workers)


_open_iterators: weakref.WeakSet[Iterator[Any]] = weakref.WeakSet()
