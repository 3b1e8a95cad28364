"""Writes the metrics of a run to files: ``metrics.jsonl``, ``metrics.csv`` and ``settings.json``."""

import csv
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine.logger_destination import Metric
from .buffered import BufferedDestination, Row, is_count

_log = logging.getLogger(__name__)


class FileLogger(BufferedDestination):
    """Writes one row per batch, with everything that was logged for it.

    Rows are written in groups, so that the host waits for values on a GPU once per group. The row of the
    latest step is kept until a later step begins or training ends, as more values may be logged; an
    evaluation after that gets a separate row.

    A killed process leaves at most one incomplete line at the end of a file. `load_state_dict` truncates the
    files to their contents at `state_dict`, so that a resumed run has the files of an uninterrupted one.

    Args:
        folder: The folder of the files; created when the first row is written.
        rows_per_write: Rows in a group, at least 1. The ends of an epoch and of the run write at once.
        append: Accept a folder that contains metrics, to continue from a checkpoint. If none is loaded, the
            metrics are replaced when the first group of rows is written.

    Raises:
        FileExistsError: If the folder already contains metrics, unless `append`.
        ValueError: If `rows_per_write` is invalid.
    """

    def __init__(self, folder: str | Path, rows_per_write: int = 10, append: bool = False) -> None:
        super().__init__(rows_per_write)
        self.folder = Path(folder)
        self.append = append
        self._jsonl = self.folder / "metrics.jsonl"
        self._csv = self.folder / "metrics.csv"
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
            ValueError: If a metric is named ``step``, like the number of the row.
        """
        if "step" in metrics:
            raise ValueError(f'metrics must not be named "step", which is the number of the row, got {metrics!r}')
        super().log_metrics(metrics, step)

    def write_rows(self, rows: Sequence[tuple[int, Row]]) -> None:
        """Append rows to both files."""
        if self.append and self._num_written == 0:
            self._keep([])  # the rows in the file belong to a run that was not resumed
        if self._num_written == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        numbered = [{"step": step, **_finite(row)} for step, row in rows]
        with open(self._jsonl, "a") as file:
            file.write("".join([json.dumps(row) + "\n" for row in numbered]))
        self._write_csv(numbered)
        self._num_written += len(rows)
        self._last_step = rows[-1][0]

    def state_dict(self) -> dict[str, Any]:
        """The position in the files and the rows that are not written yet, as plain values.

        Reading the rows waits for the device; nothing is written.

        Returns:
            ``last_step``, the step of the last written row or None; ``num_written``, the number of
            written rows, since several of one step are possible; ``rows``, a list of ``[step, row]``.
        """
        rows = [[step, _finite(row)] for step, row in self.pending_rows()]
        return {"last_step": self._last_step, "num_written": self._num_written, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the files and the pending rows to their state at `state_dict`.

        Rows that were written since then are removed, and the present pending rows are dropped. A warning reports
        rows that are missing in the file.

        Raises:
            ValueError: If `state` does not have the form that `state_dict` returns.
        """
        _check_state(state)
        self.restore_rows(state["rows"])
        last_step, num_written = state["last_step"], state["num_written"]
        found = [] if last_step is None else [pair for pair in _read(self._jsonl) if pair[1]["step"] <= last_step]
        self._keep(found[:num_written])
        if self._num_written < num_written:
            reach = "no step" if self._last_step is None else f"step {self._last_step}"
            _log.warning(
                "METRICS ARE MISSING: the checkpoint counts on %d rows up to step %s, but %s reaches to %s "
                "with %d rows",
                *(num_written, last_step, self._jsonl, reach, self._num_written),
            )

    def _keep(self, lines_and_rows: Sequence[tuple[bytes, dict[str, Any]]]) -> None:
        """Truncate both files to these lines of ``metrics.jsonl``."""
        rows = [row for _, row in lines_and_rows]
        self._columns, self._num_written = [], len(rows)
        self._last_step = rows[-1]["step"] if rows else None
        if rows:
            _replace(self._jsonl, b"".join(line for line, _ in lines_and_rows), sync=True)
            self._write_csv(rows)
        else:
            self._csv.unlink(missing_ok=True)
            self._jsonl.unlink(missing_ok=True)

    def _write_csv(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to the table; a new metric rewrites it from ``metrics.jsonl``."""
        new_columns = dict.fromkeys(name for row in rows for name in row if name not in self._columns)
        if new_columns:
            self._columns += new_columns
            header = {name: name for name in self._columns}
            _replace(self._csv, self._table([header, *(row for _, row in _read(self._jsonl))]))
        else:
            with open(self._csv, "ab") as file:
                file.write(self._table(rows))

    def _table(self, rows: Iterable[Mapping[str, Any]]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([row.get(name) for name in self._columns] for row in rows)
        return text.getvalue().encode()


def _finite(row: Row) -> Row:
    """Replace values that JSON does not support by None."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in row.items()}


def _read(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines and their rows, up to the first invalid line: a killed process may leave an incomplete one at the end."""
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
        "last_step": (state["last_step"] is None or is_count(state["last_step"]), "None or an int >= 0"),
        "num_written": (is_count(state["num_written"]), "an int >= 0"),
    }
    for name, (is_good, rule) in rules.items():
        if not is_good:
            raise ValueError(f"{name} in the state of a FileLogger must be {rule}, got {state[name]!r:.100}")
