"""Shows the progress of training: a bar in a terminal or a notebook, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from ..engine import Logger, LoggerDestination, State, TimeUnit
from ..engine.logger_destination import Metric

_SECONDS_BETWEEN_LOSSES = 0.5  # reading a loss waits for the device
_SECONDS_BETWEEN_LINES = 30.0
_LOSSES_PER_SUM = 256


class ProgressBar(LoggerDestination):
    """One bar per epoch and evaluation, with the loss and the samples per second.

    In a notebook it is a widget, on a terminal a line of standard error. If standard error is not a terminal, lines are
    printed at least 30 s apart. The results of an evaluation are printed with the mean training loss of the epoch so
    far.
    """

    def __init__(self) -> None:
        self._bar_class = _bar_class()
        self._bar: Any = None
        self._eval_bar: Any = None
        self._losses = _MeanLoss()
        self._shown_at = 0.0
        self._began_at = 0.0
        self._began_sample = 0

    def log_metrics(self, metrics: Mapping[str, Metric], step: int) -> None:
        """Keep the training loss for the display."""
        if "loss/train/total" in metrics:
            self._losses.latest = metrics["loss/train/total"]

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start the clock for lines, and the bar of an epoch that was resumed in the middle."""
        self._shown_at = self._began_at = time.monotonic()
        self._began_sample = state.timestamp.sample
        if state.timestamp.batch_in_epoch > 0:
            self._begin_bar(state)

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Begin a bar."""
        self._losses = _MeanLoss()
        self._began_at, self._began_sample = time.monotonic(), state.timestamp.sample
        self._begin_bar(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Update the bar, or print a line if the last one was printed long enough ago."""
        now = time.monotonic()
        self._losses.add(state.global_batch_num_samples)
        if self._bar is not None:
            self._bar.update()
            if now - self._shown_at > _SECONDS_BETWEEN_LOSSES:
                self._show_loss(state, now)
        elif now - self._shown_at > _SECONDS_BETWEEN_LINES:
            self._print_line(state, now)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """End the bar."""
        self._end_bars()

    def fit_end(self, state: State, logger: Logger) -> None:
        """End the bar of an epoch that is not complete."""
        self._end_bars()

    def eval_start(self, state: State, logger: Logger) -> None:
        """Begin a separate bar below that of training."""
        if self._bar_class is not None:
            total = _length(state.eval_dataloader)
            self._eval_bar = self._bar_class(
                desc=_evaluation(state),
                total=total,
                unit="ba",
                file=sys.stderr,
                leave=False,
                position=self._bar is not None,
            )

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """Update the bar of the evaluation."""
        if self._eval_bar is not None:
            self._eval_bar.update()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Print the results, above the bar if there is one."""
        if self._eval_bar is not None:
            self._eval_bar.close()
            self._eval_bar = None
        label = state.dataloader_label or "eval"
        values = {name: value for name, value in state.eval_metrics.items() if name.split("/")[1] == label}
        results = "  ".join(f"{_short(name)} {value:.4f}" for name, value in values.items())
        mean = self._losses.mean()
        loss = "" if mean is None else f"  training loss {mean:.4f}"
        line = f"epoch {state.timestamp.epoch}  batch {state.timestamp.batch}{loss}  {_evaluation(state)}: {results}"
        if self._bar_class is None:
            print(line, file=sys.stderr)
        else:
            self._bar_class.write(line, file=sys.stderr)

    def close(self, state: State, logger: Logger) -> None:
        """End the bars."""
        self._end_bars()

    def state_dict(self) -> dict[str, Any]:
        """The mean training loss of the epoch so far. Waits for the device."""
        return self._losses.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._losses.load_state_dict(state)

    def _begin_bar(self, state: State) -> None:
        if self._bar_class is not None:
            total, done = _batches_to_come(state), int(state.timestamp.batch_in_epoch)
            self._bar = self._bar_class(desc=_epoch_text(state), total=total, initial=done, unit="ba", file=sys.stderr)

    def _show_loss(self, state: State, now: float) -> None:
        self._shown_at = now
        loss = {} if self._losses.latest is None else {"loss": f"{float(self._losses.latest):.4f}"}
        self._bar.set_postfix({**loss, "samples/s": self._samples_per_second(state, now)}, refresh=False)

    def _print_line(self, state: State, now: float) -> None:
        self._shown_at = now
        total = _batches_to_come(state)
        batch = f"batch {state.timestamp.batch_in_epoch}" + (f"/{total}" if total else "")
        loss = "" if self._losses.latest is None else f"  loss {float(self._losses.latest):.4f}"
        speed = f"  samples/s {self._samples_per_second(state, now)}"
        print(f"{_epoch_text(state)}  {batch}{loss}{speed}", file=sys.stderr)

    def _samples_per_second(self, state: State, now: float) -> str:
        """Of the epoch so far, or since the run was resumed in it."""
        seconds = now - self._began_at
        return f"{(state.timestamp.sample - self._began_sample) / seconds:.4g}" if seconds > 0 else "?"

    def _end_bars(self) -> None:
        for bar in (self._eval_bar, self._bar):
            if bar is not None:
                bar.close()
        self._bar = self._eval_bar = None


class _MeanLoss:
    """The mean over the samples of an epoch, without steps whose loss was NaN or infinite.

    Losses are collected and summed in groups on their device, which has the lowest cost per step.
    """

    def __init__(self) -> None:
        self.latest: Metric | None = None
        self._losses: list[tuple[Metric, int]] = []
        self._sum = torch.zeros(2, dtype=torch.float64)  # of losses and of samples

    def add(self, num_samples: int) -> None:
        """Count the latest loss, of so many samples."""
        if self.latest is not None:
            self._losses.append((self.latest, num_samples))
            if len(self._losses) >= _LOSSES_PER_SUM:
                self._add_up()

    def mean(self) -> float | None:
        """The mean; None if there is no loss. Waits for the device."""
        self._add_up()
        total, num_samples = self._sum.tolist()
        return total / num_samples if num_samples else None

    def state_dict(self) -> dict[str, Any]:
        self._add_up()
        return {"latest": None if self.latest is None else float(self.latest), "sum": self._sum.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.latest = None if state["latest"] is None else float(state["latest"])
        self._losses = []
        self._sum = torch.tensor([float(value) for value in state["sum"]], dtype=torch.float64)

    def _add_up(self) -> None:
        if self._losses:
            losses = torch.stack([torch.as_tensor(loss) for loss, _ in self._losses]).detach().double()
            num_samples = torch.tensor([num for _, num in self._losses], device=losses.device)
            is_finite = losses.isfinite()
            total = torch.stack([losses.where(is_finite, 0) @ num_samples.double(), num_samples[is_finite].sum()])
            self._sum = self._sum.to(losses.device) + total
            self._losses = []


def _bar_class() -> Any:
    """The class of tqdm for a notebook or a terminal; None if standard error is neither."""
    from tqdm.auto import tqdm  # it looks for a notebook when it is imported
    from tqdm.std import tqdm as terminal_tqdm

    in_notebook = tqdm.__mro__[1].__module__ == "tqdm.notebook"
    if in_notebook:
        return tqdm
    return terminal_tqdm if sys.stderr.isatty() else None


def _short(name: str) -> str:
    return "loss" if name.startswith("loss/") and name.endswith("/total") else name.split("/", 2)[-1]


def _evaluation(state: State) -> str:
    """What is evaluated, with the name of the data if it has one."""
    return "evaluation" if state.dataloader_label in (None, "eval") else f"evaluation of {state.dataloader_label}"


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


def _length(dataloader: Any) -> int | None:
    try:
        return len(dataloader)
    except TypeError:
        return None
