"""Keeps the metrics of a run as files: ``metrics.jsonl``, ``metrics.csv`` and ``settings.json``."""

import csv
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..engine import Logger, LoggerDestination, State
from ..engine.logger_destination import Metric

_log = logging.getLogger(__name__)


class FileLogger(LoggerDestination):
    """Writes one row per batch, with everything that was logged when so many batches were finished.

    Rows are written in groups, so that values on a GPU are waited for once per group. The row of the
    latest step is held until a later step begins or training ends, as more may come; an evaluation
    after that has a row of its own.

    A run that is killed leaves at most half a line at the end of a file. `load_state_dict` takes the
    files back to the moment of `state_dict`, so that a resumed run has the files of an undisturbed one.

    Args:
        folder: Where to; made when the first row comes.
        rows_per_write: Rows in a group, at least 1. The ends of an epoch and of the run write at once.
        append: Accept a folder that holds metrics, to go on from a checkpoint. If none is loaded, they
            are begun anew with the first group of rows.

    Raises:
        FileExistsError: If the folder holds metrics already, unless `append`.
        ValueError: If `rows_per_write` is below 1.
    """

    def __init__(self, folder: str | Path, rows_per_write: int = 10, append: bool = False) -> None:
        if rows_per_write < 1:
            raise ValueError(f"rows_per_write must be at least 1, got {rows_per_write}")
        self.folder = Path(folder)
        self.rows_per_write = rows_per_write
        self.append = append
        self._jsonl = self.folder / "metrics.jsonl"
        self._csv = self.folder / "metrics.csv"
        self._rows: dict[int, dict[str, Metric | None]] = {}
        self._columns: list[str] = []
        self._num_written = 0
        self._last_step: int | None = None
        if self._jsonl.exists() and not append:
            raise FileExistsError(f"the run's folder must not hold metrics of another run, got {self.folder}")

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Write ``settings.json``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(hyperparameters), indent=2, default=str)
        (self.folder / "settings.json").write_text(text + "\n")

    def log_metrics(self, metrics: Mapping[str, Metric], step: int) -> None:
        """Add to the row of `step`.

        Raises:
            ValueError: If a metric is named ``step``, as the number of the row is.
        """
        if "step" in metrics:
            raise ValueError(f'metrics must not be named "step", which is the number of the row, got {metrics!r}')
        if step not in self._rows and len(self._rows) >= self.rows_per_write:
            self._write()  # every row is of an earlier step
        self._rows.setdefault(step, {}).update(metrics)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Write what is complete."""
        self._write(hold_step=state.timestamp.batch.value)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Write what there is."""
        self._write()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write what there is."""
        self._write()

    def close(self, state: State, logger: Logger) -> None:
        """Write what there is."""
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """How far the files reach and the rows that are still to be written, as plain values.

        Reading the rows waits for the device; nothing is written.

        Returns:
            ``last_step``, the step of the last written row or None; ``num_written``, the number of
            written rows, since several of one step are possible; ``rows``, a list of ``[step, row]``.
        """
        rows = [[step, _plain(row)] for step, row in self._rows.items()]
        return {"last_step": self._last_step, "num_written": self._num_written, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the files and the rows to be written back to the moment of `state_dict`.

        What was written since then is dropped, and so are rows that wait to be written now. Rows that
        should be in the file and are not are announced by a warning.

        Raises:
            ValueError: If `state` is not of the form that `state_dict` gives.
        """
        _check_state(state)
        last_step, num_written = state["last_step"], state["num_written"]
        found = [] if last_step is None else [pair for pair in _read(self._jsonl) if pair[1]["step"] <= last_step]
        self._keep(found[:num_written])
        self._rows = {step: dict(row) for step, row in state["rows"]}
        if self._num_written < num_written:
            reach = "no step" if self._last_step is None else f"step {self._last_step}"
            _log.warning(
                "METRICS ARE MISSING: the checkpoint counts on %d rows up to step %s, but %s reaches to %s "
                "with %d rows",
                *(num_written, last_step, self._jsonl, reach, self._num_written),
            )

    def _keep(self, lines_and_rows: Sequence[tuple[bytes, dict[str, Any]]]) -> None:
        """Take both files back to these lines of ``metrics.jsonl``."""
        rows = [row for _, row in lines_and_rows]
        self._columns, self._num_written = [], len(rows)
        self._last_step = rows[-1]["step"] if rows else None
        if rows:
            _replace(self._jsonl, b"".join(line for line, _ in lines_and_rows), sync=True)
            self._write_csv(rows)
        else:
            self._csv.unlink(missing_ok=True)
            self._jsonl.unlink(missing_ok=True)

    def _write(self, hold_step: int | None = None) -> None:
        held = {step: row for step, row in self._rows.items() if step == hold_step}
        rows: list[dict[str, Any]] = [
            {"step": step, **_plain(row)} for step, row in self._rows.items() if step not in held
        ]
        self._rows = held
        if not rows:
            return
        if self.append and self._num_written == 0:
            self._keep([])  # what there is comes from a run that was not resumed
        if self._num_written == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        with open(self._jsonl, "a") as file:
            file.write("".join([json.dumps(row) + "\n" for row in rows]))
        self._write_csv(rows)
        self._num_written += len(rows)
        self._last_step = rows[-1]["step"]

    def _write_csv(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows that ``metrics.jsonl`` holds; with a new name the table is made anew from there."""
        new_columns = dict.fromkeys(name for row in rows for name in row if name not in self._columns)
        if new_columns:
            self._columns += new_columns
            header = {name: name for name in self._columns}
            _replace(self._csv, self._table([header, *(row for _, row in _read(self._jsonl))]))
        else:
            with open(self._csv, "ab") as file:
                file.write(self._table(rows))

    def _table(self, rows: Iterable[dict[str, Any]]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([row.get(name) for name in self._columns] for row in rows)
        return text.getvalue().encode()


_TENSORS = (Tensor, np.generic)


def _plain(row: Mapping[str, Metric | None]) -> dict[str, float | int | None]:
    """The values as plain numbers, None for what JSON cannot say."""
    numbers = {name: value.item() if isinstance(value, _TENSORS) else value for name, value in row.items()}
    return {name: number if number is not None and math.isfinite(number) else None for name, number in numbers.items()}


def _read(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines and their rows, up to the first line that is none: a kill may leave half a line at the end."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n") or not isinstance(row, dict) or type(row.get("step")) is not int:
                return
            yield line, row


def _replace(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Give a file new content at once: a kill leaves the old or the new one; a loss of power too, if it is synced."""
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(new, path)


def _check_state(state: Any) -> None:
    names = {"last_step", "num_written", "rows"}
    if not isinstance(state, dict) or set(state) != names:
        raise ValueError(f"the state of a FileLogger must be a dict of {', '.join(sorted(names))}, got {state!r:.100}")
    rules = {
        "last_step": (state["last_step"] is None or _is_count(state["last_step"]), "None or an integer of at least 0"),
        "num_written": (_is_count(state["num_written"]), "an integer of at least 0"),
        "rows": (_are_rows(state["rows"]), "a list of [step, {name: number or None}] with one entry per step"),
    }
    for name, (is_good, rule) in rules.items():
        if not is_good:
            raise ValueError(f"{name} in the state of a FileLogger must be {rule}, got {state[name]!r:.100}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_rows(rows: Any) -> bool:
    if not isinstance(rows, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in rows):
        return False
    return all(_is_count(step) and _is_row(row) for step, row in rows) and len({step for step, _ in rows}) == len(rows)


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(
        isinstance(name, str) and (value is None or type(value) in (bool, int, float)) for name, value in row.items()
    )
