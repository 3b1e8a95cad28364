"""Shows how training goes: a bar in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from ..engine import Logger, LoggerDestination, State, TimeUnit
from ..engine.logger_destination import Metric

_SECONDS_BETWEEN_LOSSES = 0.5  # reading a loss waits for the device
_SECONDS_BETWEEN_LINES = 30.0


class ProgressBar(LoggerDestination):
    """One bar per epoch on standard error; where that is no terminal, lines at least 30 s apart."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._bar: tqdm[None] | None = None
        self._loss: Metric | None = None
        self._shown_at = 0.0

    def log_metrics(self, metrics: Mapping[str, Metric], step: int) -> None:
        """Keep the training loss to show it."""
        self._loss = metrics.get("loss/train/total", self._loss)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start the clock for lines, and the bar of an epoch that was resumed in the middle."""
        self._shown_at = time.monotonic()
        if state.timestamp.batch_in_epoch > 0:
            self._begin_bar(state)

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Begin a bar."""
        self._begin_bar(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Move on."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update()
            if now - self._shown_at > _SECONDS_BETWEEN_LOSSES:
                self._show_loss(now)
        elif now - self._shown_at > _SECONDS_BETWEEN_LINES:
            self._shown_at = now
            self._print_line(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """End the bar."""
        self._end_bar()

    def fit_end(self, state: State, logger: Logger) -> None:
        """End the bar of an epoch that is not complete."""
        self._end_bar()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Show the results, above the bar where there is one."""
        results = "  ".join(f"{_short(name)} {value:.4f}" for name, value in state.eval_metrics.items())
        loss = f"  training loss {float(self._loss):.4f}" if self._loss is not None else ""
        position = f"epoch {state.timestamp.epoch}  batch {state.timestamp.batch}"
        tqdm.write(f"{position}{loss}  evaluation: {results}", file=sys.stderr)

    def close(self, state: State, logger: Logger) -> None:
        """End the bar."""
        self._end_bar()

    def _begin_bar(self, state: State) -> None:
        if self._is_terminal:
            total, done = _batches_to_come(state), state.timestamp.batch_in_epoch
            self._bar = tqdm(desc=_epoch_text(state), total=total, initial=done, unit="ba", file=sys.stderr)

    def _show_loss(self, now: float) -> None:
        assert self._bar is not None
        self._shown_at = now
        if self._loss is not None:
            self._bar.set_postfix(loss=f"{float(self._loss):.4f}", refresh=False)

    def _print_line(self, state: State) -> None:
        total = _batches_to_come(state)
        batch = f"batch {state.timestamp.batch_in_epoch}" + (f"/{total}" if total else "")
        loss = f"  loss {float(self._loss):.4f}" if self._loss is not None else ""
        print(f"{_epoch_text(state)}  {batch}{loss}", file=sys.stderr)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _short(name: str) -> str:
    return "loss" if name == "loss/eval/total" else name.split("/")[-1]


def _epoch_text(state: State) -> str:
    whole = state.max_duration
    of = f"/{whole.value}" if whole is not None and whole.unit is TimeUnit.EPOCH else ""
    return f"epoch {state.timestamp.epoch + 1}{of}"


def _batches_to_come(state: State) -> int | None:
    whole = state.max_duration
    if whole is not None and whole.unit is TimeUnit.BATCH:
        left = whole.value - state.timestamp.batch + state.timestamp.batch_in_epoch
        return int(min(left, state.batches_per_epoch or left))
    return state.batches_per_epoch
