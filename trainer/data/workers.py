"""Worker processes of dataloaders: they ignore SIGTERM and SIGINT, and are ended by the main process."""

import atexit
import signal
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch.utils.data import get_worker_info

from ..torch_internals import shut_down_workers, worker_processes


class WorkerInit:
    """A `worker_init_fn` that ignores SIGTERM and SIGINT, as the running step still needs its batch.

    Args:
        worker_init_fn: The user's own, which is called afterwards.
    """

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        self._worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        info: Any = get_worker_info()
        own = getattr(info.dataset, "user_dataset", None)
        if own is not None:  # get_worker_info() must give the user's own dataset; it is frozen
            object.__setattr__(info, "dataset", own)
        if self._worker_init_fn is not None:
            self._worker_init_fn(worker_id)


def tracked(iterator: Iterator[Any]) -> Iterator[Any]:
    """Make sure that the workers of an iterator that is still open at exit are ended."""
    if worker_processes(iterator):
        _open_iterators.add(iterator)
        _end_workers_at_exit()
    return iterator


def end_workers(iterator: Any) -> None:
    """End the workers of a DataLoader's iterator, if it has any, with SIGKILL where nothing else helps."""
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
    # At exit multiprocessing would wait forever for workers that ignore SIGTERM. The last registered is called first.
    atexit.register(_end_all_workers)


_open_iterators: weakref.WeakSet[Iterator[Any]] = weakref.WeakSet()
