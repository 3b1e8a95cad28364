"""The callback that saves checkpoints: how often, how many are kept, and the best one."""

import errno
import logging
import math
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from ...engine import Callback, Logger, State, Time, TimeUnit
from .. import distributed
from ..checks import check_choice, check_folder, check_num_to_keep, check_save_interval
from ..settings import check_same_on_all_ranks
from .contents import check_savable, contents_of
from .file import write_checkpoint
from .folder import CHECKPOINT_NAME, checkpoint_name, newest_first, remove_old, remove_stale, set_pointer
from .shards import remove_shards, write_shards

_log = logging.getLogger(__name__)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class CheckpointSaver(Callback):
    """Saves the run as ``folder/ep{epoch}-ba{batch}.pt``, with everything that resuming it needs.

    The first checkpoint is saved before the first step, so that a state that cannot be saved raises early, and the
    last one at the end of training. Files are written atomically. The file ``latest`` in the folder names the newest
    checkpoint, ``best`` the best one. Rank 0 writes, except for shards.

    Args:
        folder: Folder of the checkpoints.
        interval: Interval between checkpoints in epochs, batches, samples, a fraction of the training (``"0.1dur"``)
            or wall-clock time (``"10min"``, ``"30sec"``).
        num_to_keep: Number of newest checkpoints to keep, at least 1; -1 keeps all.
        best: Also keep the checkpoint with the best evaluation: ``"max:"`` or ``"min:"`` followed by the name of a
            metric, such as ``"max:metrics/eval/MulticlassAccuracy"``. It is saved right after the evaluation.
        on_full_disk: Whether a full disk raises (``"stop"``), or training continues without the new checkpoint and
            logs an error (``"continue"``). The previous checkpoint is kept in both cases.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the value of an argument is invalid.
    """

    def __init__(
        self,
        folder: str | Path,
        interval: str | Time = "1ep",
        *,
        num_to_keep: int = 3,
        best: str | None = None,
        on_full_disk: Literal["stop", "continue"] = "stop",
    ) -> None:
        self.folder = check_folder("folder", folder)
        self.interval = check_save_interval("interval", interval)
        self.num_to_keep = check_num_to_keep("num_to_keep", num_to_keep)
        self.on_full_disk = check_choice("on_full_disk", on_full_disk, ("stop", "continue"))
        self._best_mode, self._best_metric = _read_best(best)
        self.last_error: Exception | None = None  # raised by the last save
        self._best_value: float | None = None
        self._best_name: str | None = None
        self._best_before: tuple[float | None, str | None] = (None, None)  # restored if saving the new best one fails
        self._is_better = False
        self._saved_at: tuple[int, int] | None = None
        self._damaged: set[str] = set()  # checkpoints newer than the one that the run was resumed from
        self._periods = 0  # number of complete intervals at the last check
        self._clock = 0.0
        self._counts = {"batches": 0, "epochs": 0, "evaluations": 0}  # since fit began
        self._may_have_changed = False

    def init(self, state: State, logger: Logger) -> None:
        """Check that `best` comes with evaluation data."""
        if self._best_metric is not None and state.eval_dataloader is None:
            raise ValueError(
                f'best must come with an eval_dataloader to have an effect, got "{self._best_mode}:{self._best_metric}"'
            )
        if self._best_metric is not None:
            _check_metric(self._best_metric, state)

    def before_load(self, state: State, logger: Logger) -> None:
        """Check that the settings are the same on all ranks, which must save together."""
        check_same_on_all_ranks(
            {
                "CheckpointSaver": {
                    "interval": str(self.interval),
                    "num_to_keep": self.num_to_keep,
                    "best": f"{self._best_mode}:{self._best_metric}",
                    "on_full_disk": self.on_full_disk,
                }
            }
        )

    def after_load(self, state: State, logger: Logger) -> None:
        """Look up the loaded checkpoint and the best one in the folder."""
        best = self.folder / (self._best_name or "")
        is_saved, has_best = distributed.from_rank_zero(
            ((self.folder / checkpoint_name(*_moment(state))).is_file(), best.is_file())
        )
        if is_saved:
            self._saved_at = _moment(state)
            loaded = checkpoint_name(*_moment(state))
            newer = takewhile(lambda path: path.name != loaded, newest_first(self.folder))
            self._damaged = {path.name for path in newer}
        if not has_best:
            self._best_value, self._best_name = None, None  # start over: the best one is in another folder

    def fit_start(self, state: State, logger: Logger) -> None:
        """Remove files of killed processes, and save a first checkpoint."""
        with distributed.all_or_none():
            if distributed.rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                remove_stale(self.folder)
        self._clock = time.monotonic()
        self._periods = self._count_periods(state)
        if self._saved_at is None:
            self.save(state, logger, must_succeed=True)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Compare this evaluation with the best one so far."""
        self._count("evaluations")
        if self._best_metric is None or state.max_duration is None:
            return
        if self._best_metric not in state.eval_metrics:
            known = ", ".join(state.eval_metrics)
            raise ValueError(f"best must name one of the evaluation's metrics {known}, got {self._best_metric!r}")
        value = state.eval_metrics[self._best_metric]
        sign = 1 if self._best_mode == "max" else -1
        if not math.isnan(value) and (self._best_value is None or sign * value > sign * self._best_value):
            if not self._is_better:
                self._best_before = self._best_value, self._best_name
            self._best_value, self._is_better = value, True

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save if a checkpoint is due."""
        self._count("batches")
        self._save_if_due(state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save if a checkpoint is due."""
        self._count("epochs")
        self._save_if_due(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Save the last checkpoint."""
        self.save_once(state, logger)

    def save_once(self, state: State, logger: Logger, *, must_succeed: bool = False) -> None:
        """Save unless this step was saved already."""
        if self._saved_at != _moment(state) or self._is_better:
            self.save(state, logger, must_succeed=must_succeed)

    def save(self, state: State, logger: Logger, *, must_succeed: bool = False) -> None:
        """Save a checkpoint. All ranks must call it together.

        Args:
            state: State of the run.
            logger: Logger of the run.
            must_succeed: Raise for a full disk even with ``on_full_disk="continue"``.

        Raises:
            OSError: If the file cannot be written.
        """
        name, is_better = checkpoint_name(*_moment(state)), self._is_better
        if is_better:
            self._best_name = name
        self._is_better = False
        self.last_error = error = self._write(name, contents_of(state, logger))
        if error is None:
            self._saved_at = _moment(state)
            return
        if is_better:
            self._best_value, self._best_name = self._best_before
        if must_succeed or self.on_full_disk == "stop" or getattr(error, "errno", None) not in _NO_SPACE:
            error.add_note(f"while saving {self.folder / name}; earlier checkpoints are kept")
            raise error
        if distributed.rank() == 0:
            _log.error("no space left to save %s, training continues with the previous one kept", self.folder / name)

    def state_dict(self) -> dict[str, Any]:
        """The best checkpoint so far."""
        best = f"{self._best_mode}:{self._best_metric}"
        return {"best": best, "best_value": self._best_value, "best_name": self._best_name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: If it is something else.
        """
        value, name = state["best_value"], state["best_name"]
        is_name = name is None or (isinstance(name, str) and CHECKPOINT_NAME.fullmatch(name))
        if type(value) not in (float, int, type(None)) or value != value or not is_name:
            raise ValueError(f"the best checkpoint must be a number and a file name, got {value!r} and {name!r}")
        is_same = state["best"] == f"{self._best_mode}:{self._best_metric}"
        self._best_value, self._best_name = (value, name) if is_same else (None, None)

    def _save_if_due(self, state: State, logger: Logger) -> None:
        periods = self._count_periods(state)
        is_due, self._periods = periods > self._periods, periods
        if is_due or self._is_better:
            self.save_once(state, logger)
        elif self._may_have_changed:
            check_savable(state, logger)
        self._may_have_changed = False

    def _count(self, what: str) -> None:
        """Count what may change the kind of a state, which is checked after the first one and ever less often.

        So a state that can no longer be saved is found long before the next save is due.
        """
        self._counts[what] += 1
        self._may_have_changed |= self._counts[what].bit_count() == 1

    def _count_periods(self, state: State) -> int:
        """The number of complete intervals; wall-clock time is that of rank 0."""
        value, unit = self.interval.value, self.interval.unit
        if unit in (TimeUnit.SECOND, TimeUnit.MINUTE):
            seconds = value * (60 if unit is TimeUnit.MINUTE else 1)
            return distributed.from_rank_zero(int((time.monotonic() - self._clock) / seconds))
        return state.count_intervals(self.interval)

    def _write(self, name: str, contents: dict[str, Any]) -> Exception | None:
        return _write(self.folder / name, contents, lambda: self._publish(name))

    def _publish(self, name: str) -> None:
        """Update the files ``latest`` and ``best``, and remove old checkpoints."""
        self._damaged.discard(name)
        if self._best_name == name:
            set_pointer(self.folder, "best", name)
        set_pointer(self.folder, "latest", name)
        if self.num_to_keep != -1:
            remove_old(self.folder, self.num_to_keep, {name, self._best_name or name}, self._damaged)


def save_checkpoint(path: Path, state: State, logger: Logger) -> None:
    """Save a run to one file, and its shards to a folder next to it. All ranks must call it together between steps.

    Raises:
        OSError: If the file cannot be written.
    """
    error = _write(path, contents_of(state, logger), lambda: None)
    if error is not None:
        raise error


def save_after(error: BaseException, saver: CheckpointSaver, state: State, logger: Logger) -> None:
    """Save the last finished step after `error` has ended the training.

    Does nothing if the error comes from the step or from saving, nor on several ranks, as other ranks may not take
    part. If saving fails, a note is added to `error`.
    """
    is_of_steps = isinstance(error, FloatingPointError) or error is saver.last_error
    if not isinstance(error, Exception) or is_of_steps or state.world_size > 1:
        return
    try:
        saver.save_once(state, logger, must_succeed=True)
    except Exception as another:
        error.add_note(f"saving the last finished step failed, too: {another!r}")


def _write(path: Path, contents: dict[str, Any], publish: Callable[[], None]) -> Exception | None:
    """Write the shards on all ranks, then the file on rank 0. Returns an error, the same on all ranks."""
    try:
        contents = write_shards(contents, path)
    except OSError as error:
        return error
    return distributed.from_rank_zero(_write_alone(path, contents, publish) if distributed.rank() == 0 else None)


def _write_alone(path: Path, contents: dict[str, Any], publish: Callable[[], None]) -> Exception | None:
    try:
        write_checkpoint(path, contents)
        remove_shards(path, keep=contents.get("shards", {}).get("folder"))
        publish()
    except Exception as error:
        return error
    return None


def _check_metric(name: str, state: State) -> None:
    """Refuse the name of a metric that no evaluation of the run will have; what follows a slash is seen then."""
    model: Any = state.model
    metrics = list(model.get_metrics(is_train=False)) if hasattr(model, "get_metrics") else []
    known = [
        *(f"loss/{evaluator.label}/total" for evaluator in state.evaluators),
        *(f"metrics/{evaluator.label}/{each}" for evaluator in state.evaluators for each in evaluator.select(metrics)),
    ]
    is_loss_part = any(name.startswith(f"loss/{evaluator.label}/") for evaluator in state.evaluators)
    if not is_loss_part and not any(name == each or name.startswith(f"{each}/") for each in known):
        raise ValueError(f"best must name one of the evaluation's metrics, {', '.join(known)}, got {name!r}")


def _moment(state: State) -> tuple[int, int]:
    return state.timestamp.epoch.value, state.timestamp.batch.value


def _read_best(best: str | None) -> tuple[str, str | None]:
    if best is None:
        return "", None
    mode, _, metric = best.partition(":") if isinstance(best, str) else ("", "", "")
    if mode not in ("max", "min") or not metric:
        raise ValueError(f'best must be "max:" or "min:" and the name of a metric, got {best!r}')
    return mode, metric
