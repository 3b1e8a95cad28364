"""Logs memory usage."""

import sys
from collections.abc import Mapping

import torch

from ..engine import Callback, Logger, State

_BYTES_PER_GB = 1e9

_METRICS = {
    "allocated_bytes.all.current": "current_allocated_mem",
    "active_bytes.all.current": "current_active_mem",
    "inactive_split_bytes.all.current": "current_inactive_mem",
    "reserved_bytes.all.current": "current_reserved_mem",
    "allocated_bytes.all.peak": "peak_allocated_mem",
    "active_bytes.all.peak": "peak_active_mem",
    "inactive_split_bytes.all.peak": "peak_inactive_mem",
    "reserved_bytes.all.peak": "peak_reserved_mem",
    "num_alloc_retries": "alloc_retries",
}


class MemoryMonitor(Callback):
    """Logs the memory in use after the backward pass of every step, in gigabytes (10**9 bytes).

    On a CUDA device these are the statistics of torch's allocator on rank 0, under Composer's names:
    ``memory/current_allocated_mem``, ``memory/peak_reserved_mem`` and so on, ``memory/alloc_retries`` being a number.
    On a CPU it is ``memory/peak_resident_mem``, the largest amount of memory that the process has occupied.

    Args:
        memory_keys: Which of the statistics of ``torch.cuda.memory_stats`` to log, and under which names; by default
            those of Composer.
    """

    def __init__(self, memory_keys: Mapping[str, str] | None = None) -> None:
        self.memory_keys = dict(_METRICS if memory_keys is None else memory_keys)

    def init(self, state: State, logger: Logger) -> None:
        """Check the names of the statistics.

        Raises:
            ValueError: If `memory_keys` names an unknown one.
        """
        if state.device.type != "cuda":
            return
        known = torch.cuda.memory_stats(state.device) or _METRICS
        if unknown := [key for key in self.memory_keys if key not in known]:
            raise ValueError(f"memory_keys must be statistics of torch.cuda.memory_stats, got {unknown[0]!r}")

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Log the memory in use. It needs no synchronization with the device."""
        if state.device.type != "cuda":
            logger.log_metrics({"memory/peak_resident_mem": _peak_resident_bytes() / _BYTES_PER_GB})
            return
        stats = torch.cuda.memory_stats(state.device)
        logger.log_metrics(
            {
                f"memory/{name}": stats[key] / _BYTES_PER_GB if "bytes" in key else stats[key]
                for key, name in self.memory_keys.items()
            }
        )


def _peak_resident_bytes() -> int:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
