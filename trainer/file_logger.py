"""Keeps the metrics of a run as files: ``metrics.jsonl``, ``metrics.csv`` and ``settings.json``."""

import csv
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from ..engine import Logger, LoggerDestination, State
from ..engine.logger import Metric


class FileLogger(LoggerDestination):
    """Writes one row per batch, with everything that was logged when so many batches were finished.

    Rows are written in groups, so that values on a GPU are waited for once per group. The row of the
    latest step is held until a later step begins or training ends, as more may come; an evaluation
    after that has a row of its own.

    Args:
        folder: Where to; made when the first row comes.
        rows_per_write: Rows in a group, at least 1. The ends of an epoch and of the run write at once.

    Raises:
        FileExistsError: If the folder holds metrics already.
        ValueError: If `rows_per_write` is below 1.
    """

    def __init__(self, folder: str | Path, rows_per_write: int = 10) -> None:
        if rows_per_write < 1:
            raise ValueError(f"rows_per_write must be at least 1, got {rows_per_write}")
        self.folder = Path(folder)
        self.rows_per_write = rows_per_write
        self._rows: dict[int, dict[str, Metric]] = {}
        self._columns: list[str] = []
        self._jsonl: TextIO | None = None
        self._csv: TextIO | None = None
        if (self.folder / "metrics.jsonl").exists():
            raise FileExistsError(f"the run's folder must not hold metrics of another run, got {self.folder}")

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Write ``settings.json``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(hyperparameters), indent=2, default=str)
        (self.folder / "settings.json").write_text(text + "\n")

    def log_metrics(self, metrics: Mapping[str, Metric], step: int) -> None:
        """Add to the row of `step`."""
        if step not in self._rows and len(self._rows) >= self.rows_per_write:
            self._write()  # every row is of an earlier step
        self._rows.setdefault(step, {}).update(metrics)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Write what is complete."""
        self._write(hold_step=state.timestamp.batch)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Write what there is."""
        self._write()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write what there is."""
        self._write()

    def close(self, state: State, logger: Logger) -> None:
        """Write what there is, and close the files."""
        self._write()
        for file in (self._jsonl, self._csv):
            if file is not None:
                file.close()

    def _write(self, hold_step: int | None = None) -> None:
        held = {step: row for step, row in self._rows.items() if step == hold_step}
        rows = [{"step": step, **_plain(row)} for step, row in self._rows.items() if step not in held]
        self._rows = held
        if not rows:
            return
        if self._jsonl is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._jsonl = open(self.folder / "metrics.jsonl", "a")  # noqa: SIM115  # open until close()
        self._jsonl.writelines(json.dumps(row) + "\n" for row in rows)
        self._jsonl.flush()
        self._write_csv(rows)

    def _write_csv(self, rows: list[dict[str, Any]]) -> None:
        new_columns = dict.fromkeys(name for row in rows for name in row if name not in self._columns)
        if new_columns:
            rows = self._begin_csv(new_columns) + rows
        assert self._csv is not None
        csv.writer(self._csv).writerows([row.get(name) for name in self._columns] for row in rows)
        self._csv.flush()

    def _begin_csv(self, new_columns: Iterable[str]) -> list[dict[str, Any]]:
        """Begin the file anew under a longer header; the rows that it held are returned."""
        path, earlier = self.folder / "metrics.csv", []
        if self._csv is not None:
            self._csv.close()
            with open(path, newline="") as file:
                earlier = list(csv.DictReader(file))
        self._columns += new_columns
        self._csv = open(path, "w", newline="")  # noqa: SIM115  # open until close()
        csv.writer(self._csv).writerow(self._columns)
        return earlier


def _plain(row: Mapping[str, Metric]) -> dict[str, float | int | None]:
    """The values as plain numbers, None for what JSON cannot say."""
    numbers = {name: value.item() if isinstance(value, Tensor) else value for name, value in row.items()}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}
