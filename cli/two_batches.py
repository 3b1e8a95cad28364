"""A callback that ends a training after two batches."""

import time

import torch

from ..engine import Callback, Logger, State

_NUM_BATCHES = 2


class TwoBatches(Callback):
    """Ends the training after two batches, and keeps the time of the second, loading included."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._clock = 0.0

    def batch_start(self, state: State, logger: Logger) -> None:
        """Start the clock, for the case that there is only one batch."""
        if self._clock == 0:
            self._clock = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Keep the time, and end the training after the second batch."""
        if state.device.type == "cuda":
            torch.cuda.synchronize(state.device)
        now = time.perf_counter()
        self.seconds, self._clock = now - self._clock, now
        if int(state.timestamp.batch) >= _NUM_BATCHES:
            state.stop_training()
