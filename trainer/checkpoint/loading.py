"""Finds the checkpoint that a run starts from, the same one on all ranks, or the weights in it."""

import logging
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .. import distributed
from .file import read_checkpoint
from .folder import newest_first, newest_good
from .shards import whole_weights

_log = logging.getLogger(__name__)


class Found(NamedTuple):
    """A checkpoint to start from.

    Args:
        path: Where it lies.
        contents: What is in it, verified.
        weights_only: Whether a new training starts from its weights, instead of the run being resumed.
    """

    path: Path
    contents: dict[str, Any]
    weights_only: bool


def find_checkpoint(
    save_folder: Path | None, load_path: Path | None, *, load_weights_only: bool, autoresume: bool
) -> Found | None:
    """The checkpoint to resume from, verified and read; rank 0 reads it for all ranks.

    Args:
        save_folder: Where the run saves; None if it does not.
        load_path: A checkpoint, or a folder whose newest good one is meant.
        load_weights_only: Whether only its weights are taken.
        autoresume: Whether the newest good one of `save_folder`, if there is one, comes first.

    Returns:
        Its path and contents; None to start anew.

    Raises:
        ValueError: If `autoresume` has no folder to look into, or what is found is not good.
        FileNotFoundError: If there is nothing at `load_path`.
        FileExistsError: If `save_folder` holds checkpoints of another run, or later ones than the run starts from.
    """
    if autoresume and save_folder is None:
        raise ValueError("autoresume must come with a save_folder to have an effect, got none")
    found: Found | None = None
    with distributed.all_or_none():
        if distributed.rank() == 0:
            if autoresume and save_folder is not None and (own := newest_good(save_folder)) is not None:
                found = Found(*own, weights_only=False)
            elif load_path is not None:
                found = Found(*_read(load_path), weights_only=load_weights_only)
            if save_folder is not None and not autoresume:
                _check_folder(save_folder, None if found is None or found.weights_only else found.path)
            if found is not None:
                _log.info("starting from %s", found.path)
    return distributed.from_rank_zero(found)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, whole and on the CPU, as a plain ``state_dict`` of the model that trained.

    Args:
        path: A checkpoint, or a folder whose newest good one is meant.

    Raises:
        ValueError: If it is damaged, or no checkpoint.
        FileNotFoundError: If there is nothing.
    """
    path, contents = _read(Path(path))
    return whole_weights(contents, path.parent)


def _check_folder(folder: Path, start: Path | None) -> None:
    """Refuse a folder with checkpoints that are not of the run's past: they would count as its newest."""
    found = newest_first(folder)
    if start is not None and start.resolve().parent == folder.resolve():
        found = list(takewhile(lambda path: path.name != start.name, found))  # what is newer
    if found:
        error = FileExistsError(
            f"save_folder must not hold checkpoints of another run, or later ones than the run starts from, got "
            f"{found[0]}"
        )
        error.add_note("to resume from it, pass autoresume=True")
        raise error


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
    if not path.is_dir():
        return path, read_checkpoint(path)
    found = newest_good(path)
    if found is None:
        raise FileNotFoundError(f"load_path must be a checkpoint or a folder with some, got {path}, which has none")
    return found
