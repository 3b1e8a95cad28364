"""The folder of checkpoints: names, the pointers to the latest and the best, and which ones are kept."""

import logging
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .file import CheckpointError, read_checkpoint, replacing
from .shards import remove_shards, remove_unused_shards

CHECKPOINT_NAME = re.compile(r"ep(0|[1-9][0-9]*)-ba(0|[1-9][0-9]*)\.pt")
POINTERS = ("latest", "best")

_TEMPORARY_NAME = re.compile(r"\.(?:.+\.pt|latest|best)\.([0-9]{1,9})\.tmp", re.DOTALL)

_log = logging.getLogger(__name__)


def checkpoint_name(epoch: int, batch: int) -> str:
    """The file name of the checkpoint after so many epochs and batches, like ``ep3-ba120.pt``.

    Raises:
        ValueError: If a number is negative or not whole.
    """
    for name, number in {"epoch": epoch, "batch": batch}.items():
        _check_whole(name, number)
    return f"ep{epoch}-ba{batch}.pt"


def set_pointer(folder: Path, pointer: str, name: str) -> None:
    """Write atomically, into the small text file `pointer`, which checkpoint of `folder` it means.

    Args:
        folder: Where the checkpoints are.
        pointer: ``"latest"`` or ``"best"``.
        name: A file name as `checkpoint_name` gives it.

    Raises:
        ValueError: If `pointer` or `name` is something else.
        OSError: As in `write_checkpoint`.
    """
    if not CHECKPOINT_NAME.fullmatch(name):
        raise ValueError(f'name must be the file name of a checkpoint like "ep3-ba120.pt", got {name!r}')
    with replacing(folder / _check_pointer(pointer)) as file:
        file.write(f"{name}\n".encode())


def read_pointer(folder: Path, pointer: str) -> str | None:
    """The file name that a pointer holds, None if it is missing or holds anything else.

    The file that it names may be missing.

    Raises:
        ValueError: If `pointer` is not ``"latest"`` or ``"best"``.
    """
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
    """The first of `candidates` that can be loaded, with its contents; a warning is logged for each one before it.

    Returns:
        None if there are no checkpoints.

    Raises:
        CheckpointError: If there are checkpoints and none of them can be loaded.
    """
    latest = read_pointer(folder, "latest")
    if latest is not None and not (folder / latest).is_file():
        _log.warning("%s is missing, though it was the latest: falling back to the newest there is", folder / latest)
    bad = []
    for path in candidates(folder):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            _log.warning("%s is damaged (%s): falling back to the one before", path, error.reason)
            bad.append(f"{path.name} ({error.reason})")
    if bad:
        raise CheckpointError(folder, f"none of its checkpoints is good: {', '.join(bad)}")
    return None


def remove_stale(folder: Path) -> None:
    """Remove what processes that were killed left of ``.pt`` files and pointers that they wrote.

    Not to be called while another thread writes into `folder`.
    """
    if not folder.exists():
        return
    for path in list(folder.iterdir()):
        match = _TEMPORARY_NAME.fullmatch(path.name)
        if match and path.is_file() and not _is_another_process(int(match[1])):
            path.unlink(missing_ok=True)
    remove_unused_shards(folder)


def remove_old(folder: Path, keep: int, protected: Collection[str]) -> None:
    """Remove all checkpoints but the newest.

    Args:
        folder: Where the checkpoints are.
        keep: How many of the newest stay, at least 0.
        protected: File names that stay in any case.

    Raises:
        ValueError: If `keep` is negative or not whole.
    """
    _check_whole("keep", keep)
    for path in newest_first(folder)[keep:]:
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


def _is_another_process(pid: int) -> bool:
    """Whether a process other than this one runs under a number; what bears our own number an earlier one left."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _check_pointer(pointer: str) -> str:
    if pointer not in POINTERS:
        raise ValueError(f'pointer must be "latest" or "best", got {pointer!r}')
    return pointer


def _check_whole(name: str, number: int) -> None:
    if type(number) is not int or number < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, got {number!r}")
