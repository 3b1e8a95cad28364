"""A folder of checkpoints: their names, the pointers to the latest and the best, and which ones are kept."""

import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ...engine.checks import check_int
from .atomic import remove_abandoned, replacing
from .file import CheckpointError, read_checkpoint
from .shards import remove_shards, remove_unused_shards

CHECKPOINT_NAME = re.compile(r"ep(0|[1-9][0-9]*)-ba(0|[1-9][0-9]*)\.pt")
POINTERS = ("latest", "best")

_log = logging.getLogger(__name__)


def checkpoint_name(epoch: int, batch: int) -> str:
    """The file name of a checkpoint after `epoch` epochs and `batch` batches, like ``ep3-ba120.pt``."""
    for name, number in {"epoch": epoch, "batch": batch}.items():
        check_int(name, number, ge=0)
    return f"ep{epoch}-ba{batch}.pt"


def set_pointer(folder: Path, pointer: str, name: str) -> None:
    """Write the name of a checkpoint into the text file `pointer`, atomically.

    Args:
        folder: The folder of the checkpoints.
        pointer: ``"latest"`` or ``"best"``.
        name: A file name of the form that `checkpoint_name` returns.

    Raises:
        ValueError: If `pointer` or `name` is something else.
        OSError: As in `write_checkpoint`.
    """
    if not CHECKPOINT_NAME.fullmatch(name):
        raise ValueError(f'name must be the file name of a checkpoint like "ep3-ba120.pt", got {name!r}')
    with replacing(folder / _check_pointer(pointer)) as file:
        file.write(f"{name}\n".encode())


def read_pointer(folder: Path, pointer: str) -> str | None:
    """The file name in a pointer, None if the pointer is missing or holds anything else. The file may be missing."""
    path = folder / _check_pointer(pointer)
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        text = file.read(257).decode("ascii", errors="replace")  # file names have up to 255 characters
    name = text.removesuffix("\n")
    return name if CHECKPOINT_NAME.fullmatch(name) else None


def candidates(folder: Path) -> list[Path]:
    """The checkpoints to resume from, in the order to try: what ``latest`` names, then the others, newest first.

    The newest has the highest batch, then the highest epoch, in its name.
    """
    latest = read_pointer(folder, "latest")
    return sorted(newest_first(folder), key=lambda path: path.name != latest)


def newest_good(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The first of `candidates` that can be loaded, with its contents; each one before it is logged as a warning.

    Returns:
        None if there are no checkpoints.

    Raises:
        CheckpointError: If there are checkpoints and none of them can be loaded.
    """
    latest = read_pointer(folder, "latest")
    if latest is not None and not (folder / latest).is_file():
        _log.warning("the latest checkpoint %s is missing: falling back to the newest one found", folder / latest)
    bad = []
    for path in candidates(folder):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            _log.warning("%s cannot be loaded (%s): falling back to the one before", path, error.reason)
            bad.append(f"{path.name} ({error.reason})")
    if bad:
        raise CheckpointError(folder, f"none of its checkpoints can be loaded: {', '.join(bad)}")
    return None


def remove_stale(folder: Path) -> None:
    """Remove the unfinished files of processes that were killed.

    Not to be called while another thread writes into `folder`.
    """
    if folder.exists():
        remove_abandoned(folder)
        remove_unused_shards(folder)


def remove_old(folder: Path, keep: int, protected: Collection[str], damaged: Collection[str] = ()) -> None:
    """Remove all checkpoints but the newest.

    Args:
        folder: The folder of the checkpoints.
        keep: How many of the newest to keep.
        protected: File names that are always kept.
        damaged: File names that do not count as kept checkpoints. They are not removed.
    """
    check_int("keep", keep, ge=0)
    intact = [path for path in newest_first(folder) if path.name not in damaged]
    for path in intact[keep:]:
        if path.name not in protected:
            path.unlink(missing_ok=True)
            remove_shards(path)


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder; the newest has the highest batch, then the highest epoch, in its name."""
    found = []
    for path in folder.iterdir() if folder.exists() else ():
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match and path.is_file():
            found.append((int(match[2]), int(match[1]), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _check_pointer(pointer: str) -> str:
    if pointer not in POINTERS:
        raise ValueError(f'pointer must be "latest" or "best", got {pointer!r}')
    return pointer
