"""Crafted checkpoint files, and comparison of their contents."""

import hashlib
import io
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from etude.trainer.checkpoint.file import VERSION


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit: types, numbers, layout and attributes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        form = [(t.dtype, t.shape, t.stride(), t.requires_grad) for t in (a, b)]
        bits = [t.detach().contiguous().flatten().view(torch.uint8).tolist() if t.numel() else [] for t in (a, b)]
        return form[0] == form[1] and bits[0] == bits[1] and same(vars(a), vars(b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and all(same(a[key], b[key]) for key in a) and same_attributes(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return a == b


def sealed(archive: bytes) -> bytes:
    """An archive without a comment, with the checksum as its comment."""
    body = archive[:-2] + struct.pack("<H", 71)
    return body + b"sha256:" + hashlib.sha256(body).hexdigest().encode()


def torch_bytes(contents: Any, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer, **settings)
    return buffer.getvalue()


def repacked(archive: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """The archive with some records replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(buffer, "w", compression) as target:
        for name in source.namelist():
            replaced = records.get(name.split("/")[-1].replace(".", "_"))
            target.writestr(name, source.read(name) if replaced is None else replaced)
    return buffer.getvalue()


def fails(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **settings: Any) -> None:
        raise error

    return fail


OLD = {"version": VERSION, "old": torch.arange(5.0)}


def same_attributes(a: Any, b: Any) -> bool:
    return not isinstance(a, OrderedDict) or same(vars(a), vars(b))
