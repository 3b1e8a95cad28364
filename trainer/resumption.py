"""Finds the checkpoint that a run starts from, the same one on all ranks, or the weights in it."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from . import distributed
from .checkpoint_file import newest_good, read_checkpoint
from .shards import whole_weights

_log = logging.getLogger(__name__)

Found = tuple[Path, dict[str, Any]]


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
            found = newest_good(save_folder) if autoresume and save_folder is not None else None
            if found is None and load_path is not None:
                found = _read(Path(load_path))
            if found is not None:
                _log.info("starting from %s", found[0])
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


def _read(path: Path) -> Found:
    if not path.is_dir():
        return path, read_checkpoint(path)
    found = newest_good(path)
    if found is None:
        raise FileNotFoundError(f"load_path must be a checkpoint or a folder with some, got {path}, which has none")
    return found
