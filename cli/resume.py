"""``--resume``: where a run goes on from, and in which folder."""

from datetime import datetime
from pathlib import Path
from typing import Any

from ..trainer import distributed

CHECKPOINTS = "checkpoints"


def locate(resume: str | None, run_name: str | None, model: str) -> tuple[str, dict[str, Any]]:
    """The name of the run, and what the Trainer must be told for it to go on.

    Args:
        resume: None to begin anew; ``"auto"`` to go on with the run of this name if it has been begun; or
            a run's folder, or one of its checkpoints.
        run_name: The name, if it was given.
        model: Part of the name otherwise.

    Raises:
        ValueError: If ``"auto"`` comes without a name, or nothing can be resumed at a path.
    """
    if resume is None:
        return distributed.from_rank_zero(run_name or f"{model}-{datetime.now():%Y%m%d-%H%M%S}"), {}
    if resume == "auto":
        if run_name is None:
            raise ValueError("resume=auto must come with a run_name to know which run, got none")
        return run_name, {"autoresume": True}
    path = Path(resume)
    if (path / CHECKPOINTS).is_dir():
        path = path / CHECKPOINTS
    if not path.exists():
        raise ValueError(f"resume must be auto, a run's folder or a checkpoint, got {resume!r}, which is not there")
    folder = path if path.is_dir() else path.parent
    return run_name or folder.resolve().parent.name, {"load_path": path}
