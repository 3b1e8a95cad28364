"""Keeps the metrics of a run as files: ``metrics.jsonl``, ``metrics.csv`` and ``settings.json``."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..engine import Logger, LoggerDestination, State
from ..engine.logger import Metric


class FileLogger(LoggerDestination):
    """Writes one row per batch, with everything that was logged when so many batches were finished.

    Rows are written in groups, so that values on a GPU are waited for once per group.

    Args:
        folder: Where to; made when the first row comes.
        rows_per_write: Rows in a group, at least 1. An evaluation, the end of an epoch and the end
            of the run write what there is.

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
            self._write()
        self._rows.setdefault(step, {}).update(metrics)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Write what there is."""
        self._write()

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Write what there is."""
        self._write()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write what there is."""
        self._write()

    def close(self, state: State, logger: Logger) -> None:
        """Write what there is."""
        self._write()

    def _write(self) -> None:
        if not self._rows:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [{"step": step, **_plain(row)} for step, row in self._rows.items()]
        self._rows.clear()
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        self._write_csv(rows)

    def _write_csv(self, rows: list[dict[str, Any]]) -> None:
        path = self.folder / "metrics.csv"
        new_columns = dict.fromkeys(name for row in rows for name in row if name not in self._columns)
        earlier: list[dict[str, Any]] = []
        if new_columns and self._columns:  # the header grows, so the earlier rows are written again under it
            with open(path, newline="") as file:
                earlier = list(csv.DictReader(file))
        self._columns += new_columns
        with open(path, "w" if new_columns else "a", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            if new_columns:
                writer.writeheader()
            writer.writerows(earlier + rows)


def _plain(row: Mapping[str, Metric]) -> dict[str, float | int | None]:
    """The values as plain numbers, None for what JSON cannot say."""
    numbers = {name: value.item() if isinstance(value, Tensor) else value for name, value in row.items()}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}
