"""Files that are replaced atomically, and the temporary files that killed processes leave behind."""

import os
import re
import secrets
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import IO

_TEMPORARY_NAME = re.compile(r"\.(?:.+\.pt|latest|best)\.([0-9a-f]{16})\.([0-9]{1,9})\.[0-9a-f]{8}\.tmp", re.DOTALL)
_SECONDS_TO_KEEP = 24 * 60 * 60


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file to write, which replaces `path` atomically once it is on the disk. After an error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{owner()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is an entry of the folder
    finally:
        os.close(folder)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of processes that were killed.

    A file of a process of this machine is removed when that process no longer runs. Whether another machine, or a
    container with a separate PID namespace, is still writing a file cannot be known here: such a file is removed only
    when nothing was written to it for a day.

    Not to be called while another thread writes into `folder`.
    """
    for path in list(folder.iterdir()):
        match = _TEMPORARY_NAME.fullmatch(path.name)
        if match and path.is_file() and is_abandoned([path], machine=match[1], pid=int(match[2])):
            path.unlink(missing_ok=True)


def owner() -> str:
    """Names the running process in a file name: the machine and the process number."""
    return f"{_machine()}.{os.getpid()}"


def is_abandoned(paths: Iterable[Path], machine: str, pid: int) -> bool:
    """Whether the process that `owner` named no longer writes these files, as far as can be known here."""
    if machine == _machine():
        return not _is_another_process(pid)
    try:
        return time.time() - max(path.stat().st_mtime for path in paths) > _SECONDS_TO_KEEP
    except FileNotFoundError:  # finished meanwhile
        return False


def _machine() -> str:
    """Identifies where a process number means the same process: a boot of a machine and a PID namespace of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        identity = boot + os.readlink("/proc/self/ns/pid")
    except OSError:  # not on Linux
        identity = f"{socket.gethostname()} {uuid.getnode()}"
    return blake2b(identity.encode(), digest_size=8).hexdigest()


def _is_another_process(pid: int) -> bool:
    """Whether a process other than this one has this number; a file with our own number is of an earlier process."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
