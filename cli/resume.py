"""``--resume``: where a run continues, and by which command."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..trainer import distributed
from ..trainer.checks import check_run_name
from .options import TrainerOptions, TrainOptions
from .recipe import read_options, write_recipe
from .start import CHECKPOINTS, RECIPE, resumed_folder

if TYPE_CHECKING:
    from ..engine import State

CLASSES = "classes.json"

# What may differ between a run and the command that resumes it.
_MAY_CHANGE = {
    "data",  # its path: number and names of images and classes are compared
    "num_workers",
    "download",
    *(
        {option.name for option in fields(TrainerOptions)}
        - {"precision", "device_train_microbatch_size", "train_subset_num_batches", "seed", "sync_batchnorm"}
    ),
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
        model = options.model.model.replace(":", "-")
        if run_name is None:
            run_name = distributed.from_rank_zero(f"{model}-{datetime.now():%Y%m%d-%H%M%S}")
        check_run_name("run_name", run_name)
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
    folder, path = resumed_folder(resume, run_name), Path(resume)
    assert folder is not None, "there is something to resume"
    if path.is_dir():
        path = folder / CHECKPOINTS
    if not path.exists():
        what = "has no checkpoints" if Path(resume).exists() else "does not exist"
        raise ValueError(f"resume must be auto, a run's folder or a checkpoint, got {resume!r}, which {what}")
    _check_same_options(options, folder)
    run_name = run_name or folder.resolve().name
    is_own = path.is_dir() and folder.resolve() == (Path("runs") / run_name).resolve()
    # A kill may leave a checkpoint that is newer than the one that the run names as its latest: autoresume accepts it.
    return run_name, {"autoresume": True} if is_own else {"load_path": path}


def check_folder(folder: Path) -> None:
    """Check that a run can be written to a folder, which is not made yet.

    Raises:
        OSError: If it cannot.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"run_name must give a folder that can be written, {_shown(existing)} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"run_name must give a folder that can be written, {_shown(existing)} cannot be")


def check_same_classes(folder: Path, class_names: tuple[str, ...]) -> None:
    """Refuse data with other classes than those of the run that is resumed.

    Raises:
        ValueError: With the classes that differ.
    """
    if not (folder / CLASSES).is_file():
        return
    before = json.loads((folder / CLASSES).read_text())
    if tuple(before) != class_names:
        different = sorted({*before} ^ {*class_names}) or ["their order"]
        raise ValueError(f"a resumed run must have the classes of {_shown(folder)}, but {different[0]} differs")


def keep_options(options: TrainOptions, folder: Path, class_names: tuple[str, ...]) -> None:
    """Write the options and the classes beside the results, so that the run can be resumed and repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    name = _shown(folder / RECIPE)
    write_recipe(options, folder / RECIPE, f"All options of this run: etude train --recipe {name} repeats it.")
    (folder / CLASSES).write_text(json.dumps(class_names, indent=2) + "\n")


def announce(state: State, folder: Path) -> None:
    """Say on standard error that a run is resumed, and from where, or that nothing is left to train."""
    if state.rank != 0 or state.timestamp.batch == 0:
        return
    where = f"{_shown(folder)} at epoch {int(state.timestamp.epoch)}, batch {int(state.timestamp.batch)}"
    text = f"{where} is finished: nothing is left to train" if state.is_finished else f"resuming {where}"
    print(f"etude: {text}", file=sys.stderr)


def continuing_command(folder: Path) -> str:
    """The command that continues the run."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = ["etude"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes), "-m", "etude"]
    return shlex.join([*launcher, "train", "--resume", _shown(folder)])


def _check_same_options(options: TrainOptions, folder: Path) -> None:
    """Refuse options that make it a different training, in the words of the command."""
    if not (folder / RECIPE).is_file():
        return  # the Trainer compares its settings all the same
    saved = read_options(folder / RECIPE).as_dict()
    changed = [
        f"--{name.replace('_', '-')} was {_word(saved[name])} and is {_word(value)}"
        for name, value in options.as_dict().items()
        if name not in _MAY_CHANGE and saved[name] != value
    ]
    if changed:
        raise ValueError(
            f"a resumed run must have the options of {_shown(folder)}, but {', '.join(changed)}; begin a new run for "
            "other ones"
        )


def _word(value: Any) -> str:
    return " ".join(value) or "empty" if isinstance(value, tuple) else str(value)


def _shown(folder: Path) -> str:
    return os.path.relpath(folder)
