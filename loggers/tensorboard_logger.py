"""Writes metrics for TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine import Logger, State
from .buffered import BufferedDestination, Row

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger(__name__)


class TensorboardLogger(BufferedDestination):
    """Writes metrics as TensorBoard scalars, one per step and name. ``pip install etude[tensorboard]``.

    A resumed run continues in the same folder; TensorBoard then hides what the previous process had logged after the
    checkpoint.

    Args:
        log_dir: The folder of this run; TensorBoard shows each folder as a run.
        flush_interval: Number of steps that are collected before they are written, at least 1.

    Raises:
        ImportError: If tensorboard is not installed.
        ValueError: If `flush_interval` is invalid.
    """

    def __init__(self, log_dir: str | Path = "tensorboard_logs", flush_interval: int = 100) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ImportError("TensorboardLogger needs tensorboard: pip install 'etude[tensorboard]'")
        super().__init__(flush_interval)
        self.log_dir = Path(log_dir).absolute()
        self._writer: SummaryWriter | None = None
        self._last_step: int | None = None
        self._is_resumed = False

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Write the settings as text, unless the run is resumed and already has them."""
        if not self._is_resumed:
            text = json.dumps(dict(hyperparameters), indent=4, default=str)
            indented = "\n".join(f"    {line}" for line in text.splitlines())  # code in Markdown
            self._open().add_text("settings", indented)

    def write_rows(self, rows: Sequence[tuple[int, Row]]) -> None:
        """Write each metric of each row as a scalar."""
        writer = self._open()
        for step, row in rows:
            for name, value in row.items():
                if value is not None:
                    writer.add_scalar(name, value, step)
        self._last_step = rows[-1][0]
        writer.flush()

    def close(self, state: State, logger: Logger) -> None:
        """Write all rows and close the file."""
        try:
            super().close(state, logger)
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def state_dict(self) -> dict[str, Any]:
        """The last written step, and the rows that are not written yet."""
        return {"last_step": self._last_step, "rows": self.pending_rows()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the rows of `state_dict`."""
        self.restore_rows(state["rows"])
        self._last_step = None if state["last_step"] is None else int(state["last_step"])
        self._is_resumed = True

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            if not self._is_resumed and any(self.log_dir.glob("events.out.tfevents.*")):
                _log.warning("%s holds the metrics of another run: TensorBoard shows them as one", self.log_dir)
            # The first step that TensorBoard is to hide, if an earlier process has written it.
            first_new_step = 0 if self._last_step is None else self._last_step + 1
            self._writer = SummaryWriter(str(self.log_dir), purge_step=first_new_step if self._is_resumed else None)
        return self._writer
