"""Finds the checkpoint that a run starts from, the same one on all ranks, or the weights in it."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .. import distributed
from .file import read_checkpoint
from .folder import newest_good
from .shards import whole_weights

_log = logging.getLogger(__name__)


class Found(NamedTuple):
    """A checkpoint to start from.

    Args:
        path: Where it lies.
        contents: What is in it, verified.
        is_own: Whether it is of the run itself, which goes on, and not of another one.
    """

    path: Path
    contents: dict[str, Any]
    is_own: bool


def find_checkpoint(save_folder: Path | None, load_path: str | Path | None, autoresume: bool) -> Found | None:
    """The checkpoint to resume from, verified and read; rank 0 reads it for all ranks.

    Args:
        save_folder: Where the run saves; None if it does not.
        load_path: A checkpoint, or a folder whose newest good one is meant.
        autoresume: Whether the newest good one of `save_folder`, if there is one, comes first.

    Returns:
        Its path and contents; None to start anew.

    Raises:
        ValueError: If `autoresume` has no folder to look into, or what is found is not good.
        FileNotFoundError: If there is nothing at `load_path`.
    """
    if autoresume and save_folder is None:
        raise ValueError("autoresume must come with a save_folder to have an effect, got none")
    found: Found | None = None
    with distributed.all_or_none():
        if distributed.rank() == 0:
            if autoresume and save_folder is not None and (own := newest_good(save_folder)) is not None:
                found = Found(*own, is_own=True)
            elif load_path is not None:
                found = Found(*_read(Path(load_path)), is_own=False)
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


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
    if not path.is_dir():
        return path, read_checkpoint(path)
    found = newest_good(path)
    if found is None:
        raise FileNotFoundError(f"load_path must be a checkpoint or a folder with some, got {path}, which has none")
    return found
