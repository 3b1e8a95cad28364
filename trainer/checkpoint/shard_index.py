"""The index of shards: which file holds which part of each sharded tensor, as plain values in the checkpoint."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Span = tuple[int, int]  # where a part begins in one dimension, and its size there

_MAX_DIMS = 64
_MAX_INT = 2**63


def make_index(metadata: Any) -> dict[str, Any]:
    """Where every part of every tensor lies, from torch's metadata of a checkpoint.

    Returns:
        For each tensor its ``dtype``, ``size`` and ``parts``: lists of where a part begins and its size, for each
        dimension, and its file, with the offset and the number of bytes there.
    """
    index = {
        name: {"dtype": tensor.properties.dtype, "size": list(tensor.size), "parts": []}
        for name, tensor in metadata.state_dict_metadata.items()
    }
    sizes = {
        (name, tuple(part.offsets)): list(part.sizes)
        for name, tensor in metadata.state_dict_metadata.items()
        for part in tensor.chunks
    }
    for key, stored in metadata.storage_data.items():
        begin = tuple(key.offset)
        part = [list(begin), sizes[key.fqn, begin], stored.relative_path, stored.offset, stored.length]
        index[key.fqn]["parts"].append(part)
    return index


def check_index(index: Any, file_sizes: Mapping[str, int]) -> None:
    """Check that the parts of each tensor are all of it, and lie in the files. Takes time in proportion to the parts.

    Args:
        index: As `make_index` returns it, or anything else.
        file_sizes: The number of bytes of each file.

    Raises:
        ValueError: If a tensor is not whole, or a part is not in the files; also if the parts together are larger
            than the files, so that reading them would take more memory than the files have bytes.
    """
    if not isinstance(index, dict):
        raise ValueError(f"the index of the shards must be a dictionary, got a {type(index).__name__}")
    num_bytes = 0
    for name, tensor in index.items():
        if not _is_tensor(tensor):
            raise ValueError(f"the index of the shards must hold dtype, size and parts of {name!r:.100}")
        for *_, file, offset, length in tensor["parts"]:
            if file not in file_sizes or offset + length > file_sizes[file]:
                raise ValueError(f"a part of {name!r:.100} must lie in a shard of the checkpoint, got {file!r:.100}")
            num_bytes += length
        num_values = math.prod(tensor["size"])
        is_stored = sum(part[4] for part in tensor["parts"]) >= num_values * tensor["dtype"].itemsize
        if not is_stored or not _is_whole(tensor["size"], tensor["parts"]):
            raise ValueError(f"the shards must hold each part of {name!r:.100} once, of shape {tuple(tensor['size'])}")
    if num_bytes > sum(file_sizes.values()):
        raise ValueError("the parts of the tensors must not be larger than the shards together")


def _is_tensor(tensor: Any) -> bool:
    if not isinstance(tensor, dict) or not isinstance(tensor.get("dtype"), torch.dtype):
        return False
    size, parts = tensor.get("size"), tensor.get("parts")
    if not isinstance(size, list) or not _are_counts(size) or not isinstance(parts, list):
        return False
    return all(_is_part(part, len(size)) for part in parts)


def _is_part(part: Any, num_dims: int) -> bool:
    if not isinstance(part, (list, tuple)) or len(part) != 5 or not isinstance(part[2], str):
        return False
    begin, size, _, offset, length = part
    is_box = _are_counts(begin) and _are_counts(size) and len(begin) == len(size) == num_dims
    return is_box and _are_counts([offset, length])


def _are_counts(numbers: Any) -> bool:
    if not isinstance(numbers, (list, tuple)) or len(numbers) > _MAX_DIMS:
        return False
    return all(type(number) is int and 0 <= number < _MAX_INT for number in numbers)


def _is_whole(size: Sequence[int], parts: Sequence[Sequence[Any]]) -> bool:
    """Whether the parts are a grid that covers the tensor, as shards over a mesh of devices are."""
    boxes = [tuple(zip(begin, shape, strict=True)) for begin, shape, *_ in parts if all(shape)]
    if not all(size):
        return not boxes
    spans: list[list[Span]] = [sorted({box[dim] for box in boxes}) for dim in range(len(size))]
    is_grid = len(boxes) == len(set(boxes)) == math.prod(map(len, spans))
    return is_grid and all(_are_in_a_row(of_dim, whole) for of_dim, whole in zip(spans, size, strict=True))


def _are_in_a_row(spans: Sequence[Span], whole: int) -> bool:
    """Whether spans follow each other without gaps from 0 to `whole`."""
    ends = [begin + size for begin, size in spans]
    return [begin for begin, _ in spans] == [0, *ends[:-1]] and ends[-1:] == [whole]
