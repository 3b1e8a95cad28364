"""Base class of the destinations that write rows of metrics in groups."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..engine import Logger, LoggerDestination, State
from ..engine.checks import check_int
from ..engine.logger_destination import Metric

Number = bool | int | float
Row = dict[str, Number | None]

_TENSORS = (Tensor, np.generic)


class BufferedDestination(LoggerDestination):
    """Collects what is logged into one row per step, and writes rows in groups.

    The host therefore waits for values on a GPU once per group. The row of the latest step is kept until a later step
    begins or training ends, as more values may be logged; an evaluation after that gets a separate row.

    Args:
        rows_per_write: Rows in a group, at least 1. The ends of an epoch and of the run write at once.

    Raises:
        ValueError: If `rows_per_write` is invalid.
    """

    def __init__(self, rows_per_write: int) -> None:
        self.rows_per_write = check_int("rows_per_write", rows_per_write, ge=1)
        self._rows: dict[int, dict[str, Metric | None]] = {}

    @abstractmethod
    def write_rows(self, rows: Sequence[tuple[int, Row]]) -> None:
        """Write rows, at least one.

        Args:
            rows: The step and the metrics of each.
        """

    def log_metrics(self, metrics: Mapping[str, Metric], step: int) -> None:
        """Add to the row of `step`."""
        if step not in self._rows and len(self._rows) >= self.rows_per_write:
            self._write()  # all rows belong to earlier steps
        self._rows.setdefault(step, {}).update(metrics)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Write all rows except that of the latest step."""
        self._write(hold_step=state.timestamp.batch.value)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Write all rows."""
        self._write()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write all rows."""
        self._write()

    def close(self, state: State, logger: Logger) -> None:
        """Write all rows."""
        self._write()

    def pending_rows(self) -> list[list[Any]]:
        """The rows that are not written yet, as ``[step, row]`` of plain values. Waits for the device."""
        return [[step, plain(row)] for step, row in self._rows.items()]

    def restore_rows(self, rows: Any) -> None:
        """Replace the rows that are not written yet by those of `pending_rows`.

        Raises:
            ValueError: If `rows` has another form.
        """
        if not _are_rows(rows):
            rule = "a list of [step, {name: number or None}] with one entry per step"
            raise ValueError(f"rows in the state of a {type(self).__name__} must be {rule}, got {rows!r:.100}")
        self._rows = {step: dict(row) for step, row in rows}

    def _write(self, hold_step: int | None = None) -> None:
        held = {step: row for step, row in self._rows.items() if step == hold_step}
        rows = [(step, plain(row)) for step, row in self._rows.items() if step not in held]
        self._rows = held
        if rows:
            self.write_rows(rows)


def plain(row: Mapping[str, Metric | None]) -> Row:
    """The values as plain numbers; reading a tensor waits for its device."""
    return {name: value.item() if isinstance(value, _TENSORS) else value for name, value in row.items()}


def is_count(value: Any) -> bool:
    """Whether `value` is an int >= 0."""
    return type(value) is int and value >= 0


def _are_rows(rows: Any) -> bool:
    if not isinstance(rows, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in rows):
        return False
    return all(is_count(step) and _is_row(row) for step, row in rows) and len({step for step, _ in rows}) == len(rows)


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(
        isinstance(name, str) and (value is None or type(value) in (bool, int, float)) for name, value in row.items()
    )
