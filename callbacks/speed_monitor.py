"""Logs the throughput of training, and what its steps spend their time on."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from operator import add
from typing import Any, Literal, get_args

import torch

from ..engine import Callback, Logger, State
from ..engine.checks import check_int, check_number
from .step_clock import StepClock

_log = logging.getLogger(__name__)

TimeName = Literal["seconds", "minutes", "hours", "days"]

_SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}


class SpeedMonitor(Callback):
    """Logs throughput and elapsed time after every step, under Composer's names.

    - ``throughput/batches_per_sec`` and ``throughput/samples_per_sec``: the mean over the latest `window_size` steps,
      or all steps since `Trainer.fit` was called.
    - ``throughput/device/batches_per_sec`` and ``throughput/device/samples_per_sec``: the same divided by the number
      of ranks.
    - ``time/train``, ``time/val`` and ``time/total``: the time spent training and evaluating, in `time_unit`.
    - ``step_time/data``, ``step_time/forward_backward`` and ``step_time/optimizer``: seconds per step spent waiting for
      the next batch, computing loss and gradients, and updating the parameters, as means over the same steps except
      the first one after `Trainer.fit` was called; and ``step_time/data_share``, the share of the first of these in
      their sum.

    Evaluations do not count as training time; saving checkpoints does. The clock of throughput and elapsed times is
    that of the host, which on a GPU runs ahead of the device by a step or two. The parts of a step are measured on the
    GPU itself, whose wait for data is the time in which it has nothing to do; they are logged when the GPU has finished
    the step. What algorithms do with a batch at AFTER_DATALOADER counts as waiting for data. The elapsed times continue
    in a run that is resumed.

    Stochastic depth makes steps shorter, so loading data may become the bottleneck, which then takes the time that was
    saved. A warning says so once if steps wait for data for more than `max_data_share` of their time.

    Args:
        window_size: Number of steps of the mean, at least 1.
        time_unit: Unit of the elapsed times.
        max_data_share: Share of the step time, in [0, 1], that waiting for data may take without a warning; 1 for none.

    Raises:
        ValueError: If an argument is invalid.
    """

    def __init__(self, window_size: int = 100, time_unit: TimeName = "hours", max_data_share: float = 0.2) -> None:
        if time_unit not in get_args(TimeName):
            raise ValueError(f"time_unit must be one of {', '.join(get_args(TimeName))}, got {time_unit!r}")
        self.window_size = check_int("window_size", window_size, ge=1)
        self.time_unit = time_unit
        self.max_data_share = check_number("max_data_share", max_data_share, ge=0, le=1)
        self._train_seconds = 0.0
        self._eval_seconds = 0.0
        self._window: deque[tuple[float, int, int]] = deque(maxlen=window_size + 1)  # seconds, batches, samples
        self._clock = 0.0
        self._eval_clock = 0.0
        self._step_clock = StepClock(torch.device("cpu"))  # that of the device from FIT_START on
        self._part_seconds = (0.0,) * len(_PARTS)
        self._part_window: deque[tuple[float, ...]] = deque(maxlen=window_size + 1)
        self._has_warned = False

    @property
    def data_share(self) -> float:
        """The share of waiting for data in the time of all steps since the start, except the first; 0 before."""
        return _data_share(self._part_seconds)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start the clock and a new window."""
        self._clock = time.perf_counter()
        self._window.clear()
        self._window.append((self._train_seconds, state.timestamp.batch, state.timestamp.sample))
        self._step_clock = StepClock(state.device)
        self._part_window.clear()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Begin to measure a step."""
        self._step_clock.begin_step()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """End the wait for data."""
        self._step_clock.end_part()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """End the computation of the gradients."""
        self._step_clock.end_part()

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
        self._step_clock.end_step()
        self._log_parts(state, logger)

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
        return {
            "train_seconds": self._train_seconds,
            "eval_seconds": self._eval_seconds,
            "part_seconds": self._part_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the elapsed times of `state_dict`."""
        self._train_seconds, self._eval_seconds = float(state["train_seconds"]), float(state["eval_seconds"])
        self._part_seconds = tuple(float(seconds) for seconds in state["part_seconds"])

    def _log_parts(self, state: State, logger: Logger) -> None:
        for seconds in self._step_clock.finished():
            if not self._part_window:  # the first step starts the workers and chooses the kernels
                self._part_window.append(self._part_seconds)
                continue
            self._part_seconds = tuple(map(add, self._part_seconds, seconds))
            self._part_window.append(self._part_seconds)
        num_steps = len(self._part_window) - 1
        if num_steps < 1:
            return
        means = [(end - start) / num_steps for start, end in zip(self._part_window[0], self._part_seconds, strict=True)]
        logger.log_metrics({f"step_time/{part}": mean for part, mean in zip(_PARTS, means, strict=True)})
        logger.log_metrics({"step_time/data_share": _data_share(means)})
        if num_steps == self.window_size and state.rank == 0 and not self._has_warned:
            self._warn_of_waiting(means, state)

    def _warn_of_waiting(self, means: list[float], state: State) -> None:
        share, step = _data_share(means), sum(means)
        if share <= self.max_data_share:
            return
        self._has_warned = True
        workers = getattr(state.train_dataloader, "num_workers", None)
        _log.warning(
            "the latest %d steps waited for data for %.0f%% of their time, %.3g of %.3g s per step: training could be "
            "%.2g times as fast. Set more num_workers in train_dataloader%s, or make its samples cheaper to load",
            *(self.window_size, 100 * share, means[0], step, step / (step - means[0])),
            "" if workers is None else f" (now {workers})",
        )


_PARTS = ("data", "forward_backward", "optimizer")


def _data_share(seconds: Sequence[float]) -> float:
    """The share of waiting for data in the time of all parts."""
    return seconds[0] / sum(seconds) if sum(seconds) > 0 else 0.0
