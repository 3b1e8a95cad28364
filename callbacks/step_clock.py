"""Measures the parts of a step on the clock of the device."""

import time
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch


class StepClock:
    """Measures how long the parts of each step take, without waiting for the device.

    On a CUDA device a part is what the device spends between two events of its current stream, so a part of the step
    that the host runs ahead of takes no time. The events are read once the device has passed them. On other devices
    the clock is that of the host.

    Args:
        device: Where the model is trained.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[Any] = []  # of the current step
        self._ended: deque[list[Any]] = deque()

    def begin_step(self) -> None:
        """Begin a step, and the first part of it. A step that was not ended is forgotten."""
        self._marks = [self._now()]

    def end_part(self) -> None:
        """End a part of the step, and begin the next one."""
        self._marks.append(self._now())

    def end_step(self) -> None:
        """End the last part of the step."""
        self.end_part()
        self._ended.append(self._marks)

    def finished(self) -> Iterator[tuple[float, ...]]:
        """For each step that the device has finished since the last call, the seconds of its parts."""
        while self._ended and (not self._is_cuda or self._ended[0][-1].query()):
            marks = self._ended.popleft()
            if self._is_cuda:
                yield tuple(before.elapsed_time(after) / 1000 for before, after in pairwise(marks))
            else:
                yield tuple(after - before for before, after in pairwise(marks))

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
