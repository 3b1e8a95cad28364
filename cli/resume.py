"""``--resume``: which checkpoint a run is resumed from, and the folder of the run."""

from datetime import datetime
from pathlib import Path
from typing import Any

from ..trainer import distributed

CHECKPOINTS = "checkpoints"


def locate(resume: str | None, run_name: str | None, model: str) -> tuple[str, dict[str, Any]]:
    """The name of the run, and the arguments of the Trainer that resume it.

    Args:
        resume: None to start a new run; ``"auto"`` to resume the run named `run_name` if it exists; or the folder
            of a run, or one of its checkpoints.
        run_name: The name of the run, if one was given.
        model: Part of the name otherwise.

    Raises:
        ValueError: If `resume` is ``"auto"`` without a `run_name`, or a path that does not exist.
    """
    if resume is None:
        return distributed.from_rank_zero(run_name or f"{model}-{datetime.now():%Y%m%d-%H%M%S}"), {}
    if resume == "auto":
        if run_name is None:
            raise ValueError("resume=auto needs a run_name, got none")
        return run_name, {"autoresume": True}
    path = Path(resume)
    if (path / CHECKPOINTS).is_dir():
        path = path / CHECKPOINTS
    if not path.exists():
        raise ValueError(f"resume must be auto, a run's folder or a checkpoint, got {resume!r}, which does not exist")
    folder = path if path.is_dir() else path.parent
    return run_name or folder.resolve().parent.name, {"load_path": path}
