"""The file of one checkpoint, written atomically and verified before it is loaded.

The file is a zip archive of uncompressed records, as ``torch.save`` writes it. The archive comment holds the SHA-256 of
all bytes before it, because the checksums of the archive do not cover its directory, where one flipped bit can change
a tensor.
"""

import hashlib
import os
import struct
import sys
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import IO, Any

import torch
from torch import Tensor, nn

from .atomic import replacing
from .bounds import check_expansion, check_hashing
from .shards import check_shards

VERSION = 3

_COMMENT_START = b"sha256:"
_COMMENT_LENGTH = len(_COMMENT_START) + 64
_PLAIN = (NoneType, bool, float, complex, str, torch.Size, torch.dtype, torch.device)
_MAX_INT_BITS = 8 * 255 - 1  # longer ints use a pickle opcode that weights_only=True does not support


class CheckpointError(ValueError):
    """Raised if a checkpoint, or every checkpoint of a folder, cannot be loaded.

    Args:
        path: The file or folder.
        reason: The reason, in one line.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} cannot be loaded: {self.reason}"


def write_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint atomically: if the process or the machine dies, `path` is the old file or the new one.

    Args:
        path: Missing folders are made, an existing file is replaced.
        contents: Plain values and tensors in dictionaries, lists, tuples and sets, with ``"version"`` 3.

    Raises:
        TypeError: If `contents` holds a type that ``torch.load(weights_only=True)`` does not load.
        ValueError: If `contents` has another version, or refers to the same large values many times.
        OSError: If the file cannot be written, for example because the disk is full. The old file is unchanged,
            unless only the final fsync of the folder failed.
    """
    check_loadable(contents, "")
    if not _has_version(contents):
        raise ValueError(f'contents must be a dict with "version" {VERSION}, got {_version_of(contents)}')
    with replacing(path) as file:
        _save(contents, file)
        check_expansion(contents, *_sizes(file))
        _seal(file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Verify a checkpoint and load it to the CPU. No code in it is run, and its size bounds time and memory.

    Returns:
        The contents that were passed to `write_checkpoint`.

    Raises:
        CheckpointError: If the file is missing, truncated or modified, is not a checkpoint or has another version,
            holds more than plain values and tensors, or is a link to a file outside its folder.
    """
    if not path.is_file():
        raise CheckpointError(path, "there is no such file")
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(path.parent)):
        raise CheckpointError(path, "it is a link to a file outside its folder")
    # Open the file only once, so that the verified file is loaded even if another process replaces it.
    with _refusing(path, "it cannot be read"), open(path, "rb") as file:
        _check_bytes(path, file)
        with _refusing(path, "it is not an archive of uncompressed records"):
            pickles = _check_records(file)
        with _refusing(path, "it would take far more time or memory than its size allows"):
            for pickled in pickles:
                check_hashing(pickled)
        with _refusing(path, "torch cannot load it as plain values and tensors"):
            contents = _load(file)
        with _refusing(path, "it would take far more time or memory than its size allows"):
            check_expansion(contents, *_sizes(file))
    if not _has_version(contents):
        raise CheckpointError(path, _describe_version(contents))
    with _refusing(path, "its shards are missing or damaged"):
        check_shards(contents, path.parent)
    return contents


def check_loadable(value: Any, place: str) -> None:
    """Check that a value can be saved: ``torch.load(weights_only=True)`` must be able to load it.

    Args:
        value: To be saved.
        place: Its name, for the message.

    Raises:
        TypeError: With the place of what cannot be loaded.
    """
    kind = type(value)
    if kind in _PLAIN or (kind is int and (value if value >= 0 else ~value).bit_length() <= _MAX_INT_BITS):
        return
    if kind in (dict, OrderedDict, Counter):
        for key in value:
            if type(key) not in (str, int, float, bool):
                raise TypeError(
                    f"the keys of {place or 'contents'} must be strings or numbers to be kept in a checkpoint, "
                    f"got a {_type_name(key)}"
                )
            check_loadable(key, f"the key of {place or 'contents'}")
        _check_children(value, place)
    elif kind in (list, tuple):
        _check_children(dict(enumerate(value)), place)
    elif kind is set:
        for item in value:
            check_loadable(item, f"what is in {place}")
    elif kind not in (Tensor, nn.Parameter) or value.is_nested or value.is_mkldnn:
        article = "too long an" if kind is int else "a"
        raise TypeError(
            f"{place or 'contents'} must be plain values and tensors to be kept in a checkpoint, "
            f"got {article} {_type_name(value)}"
        )
    if kind in (OrderedDict, Tensor, nn.Parameter):  # their attributes are kept with them
        _check_children(vars(value), place)


def _has_version(contents: Any) -> bool:
    return isinstance(contents, dict) and type(contents.get("version")) is int and contents["version"] == VERSION


def _version_of(contents: Any) -> str:
    if not isinstance(contents, dict):
        return f"a {_type_name(contents)}"
    version = contents.get("version")
    is_short = type(version) is int and abs(version) < 10**9
    return f"version {version}" if is_short else f"a version that is a {_type_name(version)}"


def _describe_version(contents: Any) -> str:
    version = contents.get("version") if isinstance(contents, dict) else None
    if type(version) is int:
        return f"it is {_version_of(contents)} of the format, this release of etude reads version {VERSION}"
    return f'it must hold a dict with "version" {VERSION}, got {_version_of(contents)}'


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _check_children(children: dict[Any, Any], place: str) -> None:
    for name, child in children.items():
        check_loadable(child, f"{place}.{name}" if place else str(name))


def _save(contents: dict[str, Any], file: IO[bytes]) -> None:
    before = sys.exception()
    try:
        torch.save(contents, file)
    except RuntimeError as error:
        # After an error torch still closes the archive, and raises that failure instead of the full disk or Ctrl-C.
        first = error.__context__
        if first is None or first is before:
            raise
        raise first from None


def _seal(file: IO[bytes]) -> None:
    """Append the checksum as the comment of the archive."""
    file.seek(-2, os.SEEK_END)  # the last field of an archive is the length of its comment
    file.write(struct.pack("<H", _COMMENT_LENGTH))
    comment = _comment(file, file.tell())
    file.seek(0, os.SEEK_END)
    file.write(comment)


def _comment(file: IO[bytes], length: int) -> bytes:
    """The archive comment with the checksum of the first `length` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0 and (chunk := file.read(min(length, 2**20))):
        digest.update(chunk)
        length -= len(chunk)
    return _COMMENT_START + digest.hexdigest().encode()


@contextmanager
def _refusing(path: Path, reason: str) -> Iterator[None]:
    """Convert all exceptions to `CheckpointError`: a damaged file can raise nearly any type."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        what = f": {error}" if type(error) is ValueError and "\n" not in str(error) else ""
        raise CheckpointError(path, f"{reason} ({type(error).__name__}{what})") from error


def _check_bytes(path: Path, file: IO[bytes]) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise CheckpointError(path, "it is empty")
    length = max(size - _COMMENT_LENGTH, 0)
    file.seek(length)
    comment = file.read()
    if not comment.startswith(_COMMENT_START):
        raise CheckpointError(path, f"it does not end with a checksum: {_describe_foreign(file)}")
    if comment != _comment(file, length):
        raise CheckpointError(path, "its checksum does not match, it was truncated or modified after it was written")


def _describe_foreign(file: IO[bytes]) -> str:
    """Guess from its first bytes and its archive directory what a file without a checksum is."""
    file.seek(0)
    start = file.read(16)
    advice = "load its weights into the model yourself, with"
    if start[8:9] == b"{":
        return f"it is a safetensors file and not a checkpoint of etude; {advice} safetensors.torch.load_file"
    if start[:4] == b"PK\x03\x04" and zipfile.is_zipfile(file):
        return (
            "it was written by torch.save and not by etude, or is truncated; if it holds a state_dict, "
            f"{advice} torch.load(path, weights_only=True)"
        )
    if start[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05"):
        return f"it is a pickle and not a checkpoint of etude; {advice} torch.load(path, weights_only=True)"
    return "it is truncated, or not a checkpoint of etude"


def _check_records(file: IO[bytes]) -> list[bytes]:
    """Check that the archive does not unpack to more bytes than it has. Returns its pickled records."""
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        raise ValueError("there is other data before the archive")  # which torch would read instead
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("a record is compressed")
        if sum(record.file_size for record in records) > size:
            raise ValueError("the records are larger than the file")
        return [archive.read(record) for record in records if record.filename.endswith("data.pkl")]


def _sizes(file: IO[bytes]) -> tuple[int, int]:
    """The number of bytes of the pickles in an archive, and of the whole archive."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        pickled = sum(record.file_size for record in archive.infolist() if record.filename.endswith("data.pkl"))
    return pickled, size


def _load(file: IO[bytes]) -> Any:
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about types of files that raise above
        return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
