"""Bounds on the time and memory for reading a checkpoint, in proportion to its size.

A pickle can refer to one object many times, and an expanded tensor repeats its memory. A small crafted file can
therefore hold values that take very long to traverse, hash or copy.
"""

import pickletools
from collections import OrderedDict
from typing import Any

from torch import Tensor

_MAX_DEPTH = 200
_MIN_VALUES, _VALUES_PER_BYTE = 2**16, 4
_MIN_BYTES, _BYTES_PER_BYTE = 2**28, 4

_HASHING = ("REDUCE", "NEWOBJ", "ADDITEMS", "FROZENSET")  # their arguments may become elements of a set
_MARK = object()


def check_expansion(contents: Any, pickle_size: int, file_size: int) -> None:
    """Check that contents do not hold many more values, or larger tensors, than the file has bytes for.

    Args:
        contents: Contents of a checkpoint.
        pickle_size: Number of bytes of its pickles.
        file_size: Number of bytes of the whole file.

    Raises:
        ValueError: If there are too many values (each reference counts), tensors have too many bytes, or the nesting
            is too deep.
    """
    max_values = _MIN_VALUES + _VALUES_PER_BYTE * pickle_size
    max_bytes = _MIN_BYTES + _BYTES_PER_BYTE * file_size
    num_values = num_bytes = 0
    stack = [(contents, 0)]
    while stack:
        value, depth = stack.pop()
        num_values += 1
        if isinstance(value, Tensor) and not value.is_sparse and not value.is_meta:
            num_bytes += value.numel() * value.element_size()
        children = _children(value)
        if num_values + len(stack) + len(children) > max_values:
            raise ValueError("it refers to the same values too many times")
        if num_bytes > max_bytes:
            raise ValueError("it holds tensors that are larger than the file; expanded tensors must be made contiguous")
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
        stack += [(child, depth + 1) for child in children]


def check_hashing(pickled: bytes) -> None:
    """Check that loading a pickle does not hash deeply nested keys, such as tuples of references to tuples.

    Raises:
        ValueError: If it does, or if it is not a pickle.
    """
    limit = _MIN_VALUES + _VALUES_PER_BYTE * len(pickled)
    hashed = 0
    stack: list[Any] = []  # number of values in each object
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name == "MARK":
            stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            taken = _take(stack, opcode)
            if name in _HASHING:
                hashed += sum(taken)
            elif name in ("SETITEM", "SETITEMS", "DICT"):
                keys = taken[1::2] if name != "DICT" else taken[::2]
                hashed += sum(size for size in keys if size > 1)
            if hashed > limit:
                raise ValueError("it holds keys that take too long to hash")
            stack += [min(1 + sum(taken), limit + 1)] * len(opcode.stack_after)


def _take(stack: list[Any], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Pop the arguments of an opcode from the stack, without marks."""
    names = [item.name for item in opcode.stack_before]
    taken: list[int] = []
    if "mark" in names:
        while (size := stack.pop()) is not _MARK:
            taken.append(size)
        names = names[: names.index("mark")]
    taken += [stack.pop() for _ in names]
    return taken[::-1]


def _children(value: Any) -> list[Any]:
    kind = type(value)
    if isinstance(value, dict):
        found = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        found = list(value)
    else:
        found = []
    if kind is OrderedDict or isinstance(value, Tensor):
        found += vars(value).values()
    return found
