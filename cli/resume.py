"""``--resume``: where a run continues, with which options, and by which command."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine import State
from ..trainer import distributed
from .options import TrainerOptions

if TYPE_CHECKING:
    from .train import TrainOptions

CHECKPOINTS = "checkpoints"
OPTIONS = "options.json"

# What may differ between a run and the command that resumes it.
_MAY_CHANGE = {
    "resume",
    "run_name",
    "num_workers",
    *({option.name for option in fields(TrainerOptions)} - {"precision", "device_train_microbatch_size", "seed"}),
}


def locate(options: TrainOptions) -> tuple[str, dict[str, Any]]:
    """The name of the run, and the arguments of the Trainer that make it start there.

    Raises:
        ValueError: If ``--resume auto`` comes without a name, nothing can be resumed at a path, or an option that
            must be that of the run is another.
        FileExistsError: If there is a run of this name, and it is not to be resumed.
    """
    resume, run_name = options.resume, options.run_name
    if resume is None:
        run_name = distributed.from_rank_zero(run_name or f"{options.model}-{datetime.now():%Y%m%d-%H%M%S}")
        if (Path("runs") / run_name / CHECKPOINTS).exists():
            raise FileExistsError(
                f"there is a run in runs/{run_name} already: --resume runs/{run_name} continues it, and another "
                "--run-name begins a new one"
            )
        return run_name, {}
    if resume == "auto":
        if run_name is None:
            raise ValueError("--resume auto needs a --run-name, got none")
        _check_same_options(options, Path("runs") / run_name)
        return run_name, {"autoresume": True}
    path = Path(resume)
    if (path / CHECKPOINTS).is_dir():
        path = path / CHECKPOINTS
    if not path.exists():
        raise ValueError(f"resume must be auto, a run's folder or a checkpoint, got {resume!r}, which does not exist")
    folder = (path if path.is_dir() else path.parent).resolve().parent
    _check_same_options(options, folder)
    return run_name or folder.name, {"load_path": path}


def keep_options(options: TrainOptions, folder: Path, state: State) -> None:
    """Write the options beside the results, for a command that resumes the run."""
    if state.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OPTIONS).write_text(json.dumps(_flat(options), indent=2) + "\n")


def announce(state: State, folder: Path) -> None:
    """Say on standard error that a run is resumed, and from where, or that nothing is left to train."""
    if state.rank != 0 or state.timestamp.batch == 0:
        return
    where = f"{_shown(folder)} at epoch {int(state.timestamp.epoch)}, batch {int(state.timestamp.batch)}"
    text = f"{where} is finished: nothing is left to train" if state.is_finished else f"resuming {where}"
    print(f"etude: {text}", file=sys.stderr)


def continuing_command(options: TrainOptions, folder: Path) -> str:
    """The command that continues the run."""
    from .train import TrainOptions

    defaults, words = _flat(TrainOptions()), []
    for name, value in _flat(options).items():
        if name not in ("resume", "run_name") and value != defaults[name]:
            option = name.replace("_", "-")
            words += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = ["etude"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes), "-m", "etude"]
    return shlex.join([*launcher, "train", *words, "--resume", _shown(folder)])


def _check_same_options(options: TrainOptions, folder: Path) -> None:
    """Refuse options that make it a different training, in the words of the command."""
    if not (folder / OPTIONS).is_file():
        return  # the Trainer compares its settings all the same
    saved = json.loads((folder / OPTIONS).read_text())
    changed = [
        f"--{name.replace('_', '-')} was {saved[name]} and is {value}"
        for name, value in _flat(options).items()
        if name not in _MAY_CHANGE and name in saved and saved[name] != value
    ]
    if changed:
        raise ValueError(
            f"a resumed run must have the options of {_shown(folder)}, but {', '.join(changed)}; begin a new run for "
            "other ones"
        )


def _flat(options: TrainOptions) -> dict[str, Any]:
    named = asdict(options)
    return {**named.pop("depth"), **named.pop("trainer"), **named}


def _shown(folder: Path) -> str:
    return os.path.relpath(folder)
