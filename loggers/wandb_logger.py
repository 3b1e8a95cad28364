"""Sends metrics to Weights & Biases."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..engine import Logger, State
from .buffered import BufferedDestination, Row

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run


class WandBLogger(BufferedDestination):
    """Sends settings and metrics to Weights & Biases. ``pip install etude[wandb]``.

    A resumed run continues the run on the server, which ignores steps that it already has, so no row is duplicated.
    Without a network use ``init_kwargs={"mode": "offline"}``, or ``WANDB_MODE=offline`` in the environment.

    Args:
        project: Name of the project.
        group: Name of a group of runs.
        name: Name of the run.
        entity: User or team.
        tags: Tags of the run.
        init_kwargs: Further arguments of ``wandb.init``.
        rows_per_write: Number of steps that are collected before they are sent, at least 1.

    Raises:
        ImportError: If wandb is not installed.
        ValueError: If `init_kwargs` has an argument that the logger sets, or `rows_per_write` is invalid.
    """

    def __init__(
        self,
        project: str | None = None,
        group: str | None = None,
        name: str | None = None,
        entity: str | None = None,
        tags: Sequence[str] | None = None,
        init_kwargs: Mapping[str, Any] | None = None,
        rows_per_write: int = 10,
    ) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ImportError("WandBLogger needs wandb: pip install 'etude[wandb]'")
        super().__init__(rows_per_write)
        given = {"project": project, "group": group, "name": name, "entity": entity, "tags": tags}
        given = {key: value for key, value in given.items() if value is not None}
        init_kwargs = dict(init_kwargs or {})
        if twice := [key for key in (*given, "id", "resume") if key in init_kwargs]:
            raise ValueError(f"init_kwargs must not contain arguments that the logger sets, got {twice[0]!r}")
        self.init_kwargs = {**init_kwargs, **given}
        self._run: Run | None = None
        self._run_id = uuid.uuid4().hex[:8]
        self._is_resumed = False

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Add the settings to the configuration of the run."""
        self._open().config.update(dict(hyperparameters), allow_val_change=True)

    def write_rows(self, rows: Sequence[tuple[int, Row]]) -> None:
        """Send each row under its step."""
        run = self._open()
        for step, row in rows:
            run.log({name: value for name, value in row.items() if value is not None}, step=step)

    def close(self, state: State, logger: Logger) -> None:
        """Send all rows and finish the run."""
        try:
            super().close(state, logger)
        finally:
            if self._run is not None:
                self._run.finish()
                self._run = None

    def state_dict(self) -> dict[str, Any]:
        """The id of the run, and the rows that are not sent yet."""
        return {"run_id": self._run_id, "rows": self.pending_rows()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the run of `state_dict`."""
        self.restore_rows(state["rows"])
        self._run_id = str(state["run_id"])
        self._is_resumed = True

    def _open(self) -> Run:
        if self._run is None:
            import wandb

            resume: dict[str, Any] = {"resume": "allow"} if self._is_resumed else {}
            self._run = wandb.init(id=self._run_id, **resume, **self.init_kwargs)
        return self._run
