"""Finds the checkpoint that a run starts from, the same one on all ranks."""

import logging
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from .. import distributed
from .file import read_checkpoint
from .folder import newest_first, newest_good

_log = logging.getLogger(__name__)


class Found(NamedTuple):
    """A checkpoint to start from.

    Args:
        path: The file.
        contents: Its contents, verified.
        weights_only: Whether a new training starts from its weights, instead of resuming the run.
    """

    path: Path
    contents: dict[str, Any]
    weights_only: bool


def find_checkpoint(
    save_folder: Path | None, load_path: Path | None, *, load_weights_only: bool, autoresume: bool
) -> Found | None:
    """The checkpoint to resume from, verified and read; rank 0 reads it for all ranks.

    Args:
        save_folder: Where the run saves its checkpoints; None if it saves none.
        load_path: A checkpoint, or a folder, of which the newest valid one is used.
        load_weights_only: Whether only its weights are loaded.
        autoresume: Whether the newest valid one in `save_folder`, if any, takes precedence.

    Returns:
        The checkpoint; None to start a new run.

    Raises:
        ValueError: If `autoresume` is given without a `save_folder`, or the checkpoint is invalid.
        FileNotFoundError: If there is no checkpoint at `load_path`.
        FileExistsError: If `save_folder` contains checkpoints of another run, or newer ones than the run starts from.
    """
    if autoresume and save_folder is None:
        raise ValueError("autoresume must come with a save_folder to have an effect, got none")
    found: Found | None = None
    with distributed.all_or_none():
        if distributed.rank() == 0:
            if autoresume and save_folder is not None and (own := newest_good(save_folder)) is not None:
                found = Found(*own, weights_only=False)
            elif load_path is not None:
                found = Found(*read_start(load_path), weights_only=load_weights_only)
            if save_folder is not None and not autoresume:
                _check_folder(save_folder, None if found is None or found.weights_only else found.path)
            if found is not None:
                _log.info("starting from %s", found.path)
    return distributed.from_rank_zero(found)


def _check_folder(folder: Path, start: Path | None) -> None:
    """Raise if a folder contains checkpoints that this run does not continue: they would count as its newest."""
    found = newest_first(folder)
    if start is not None and start.resolve().parent == folder.resolve():
        found = list(takewhile(lambda path: path.name != start.name, found))  # newer ones
    if found:
        error = FileExistsError(
            f"save_folder must not hold checkpoints of another run, or later ones than the run starts from, got "
            f"{found[0]}"
        )
        error.add_note("to resume from it, pass autoresume=True")
        raise error


def read_start(path: Path) -> tuple[Path, dict[str, Any]]:
    """Read a checkpoint, or the newest valid one of a folder; its path and contents.

    Raises:
        ValueError: If the file is damaged or not a checkpoint.
        FileNotFoundError: If there is none.
    """
    if not path.is_dir():
        return path, read_checkpoint(path)
    found = newest_good(path)
    if found is None:
        raise FileNotFoundError(
            f"load_path must be a checkpoint or a folder of checkpoints, got {path}, which has none"
        )
    return found
