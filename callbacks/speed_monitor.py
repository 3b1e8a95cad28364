"""Logs the throughput of training."""

import time
from collections import deque
from typing import Any, Literal, get_args

from ..engine import Callback, Logger, State

TimeName = Literal["seconds", "minutes", "hours", "days"]

_SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}


class SpeedMonitor(Callback):
    """Logs throughput and elapsed time after every step, under Composer's names.

    - ``throughput/batches_per_sec`` and ``throughput/samples_per_sec``: the mean over the latest `window_size` steps,
      or all steps since `Trainer.fit` was called.
    - ``throughput/device/batches_per_sec`` and ``throughput/device/samples_per_sec``: the same divided by the number
      of ranks.
    - ``time/train``, ``time/val`` and ``time/total``: the time spent training and evaluating, in `time_unit`.

    Evaluations do not count as training time; saving checkpoints does. The clock is that of the host, which on a GPU
    runs ahead of the device by a step or two. The elapsed times continue in a run that is resumed.

    Args:
        window_size: Number of steps of the mean, at least 1.
        time_unit: Unit of the elapsed times.

    Raises:
        ValueError: If an argument is invalid.
    """

    def __init__(self, window_size: int = 100, time_unit: TimeName = "hours") -> None:
        if isinstance(window_size, bool) or not isinstance(window_size, int) or window_size < 1:
            raise ValueError(f"window_size must be an int of at least 1, got {window_size!r}")
        if time_unit not in get_args(TimeName):
            raise ValueError(f"time_unit must be one of {', '.join(get_args(TimeName))}, got {time_unit!r}")
        self.window_size = window_size
        self.time_unit = time_unit
        self._train_seconds = 0.0
        self._eval_seconds = 0.0
        self._window: deque[tuple[float, int, int]] = deque(maxlen=window_size + 1)  # seconds, batches, samples
        self._clock = 0.0
        self._eval_clock = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start the clock and a new window."""
        self._clock = time.perf_counter()
        self._window.clear()
        self._window.append((self._train_seconds, state.timestamp.batch, state.timestamp.sample))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the throughput and the elapsed times."""
        now = time.perf_counter()
        self._train_seconds += now - self._clock
        self._clock = now
        self._window.append((self._train_seconds, state.timestamp.batch, state.timestamp.sample))
        (start, first_batch, first_sample), (end, batch, sample) = self._window[0], self._window[-1]
        seconds = end - start
        batches, samples = (batch - first_batch) / seconds, (sample - first_sample) / seconds
        unit = _SECONDS[self.time_unit]
        logger.log_metrics(
            {
                "throughput/batches_per_sec": batches,
                "throughput/samples_per_sec": samples,
                "throughput/device/batches_per_sec": batches / state.world_size,
                "throughput/device/samples_per_sec": samples / state.world_size,
                "time/train": self._train_seconds / unit,
                "time/val": self._eval_seconds / unit,
                "time/total": (self._train_seconds + self._eval_seconds) / unit,
            }
        )

    def eval_start(self, state: State, logger: Logger) -> None:
        """Start the clock of an evaluation."""
        self._eval_clock = time.perf_counter()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Add its time to the evaluation time."""
        seconds = time.perf_counter() - self._eval_clock
        self._eval_seconds += seconds
        self._clock += seconds

    def state_dict(self) -> dict[str, Any]:
        """The elapsed times in seconds."""
        return {"train_seconds": self._train_seconds, "eval_seconds": self._eval_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the elapsed times of `state_dict`."""
        self._train_seconds, self._eval_seconds = float(state["train_seconds"]), float(state["eval_seconds"])
