"""Batches in any container: read them in the loop, count their rows, split them, move them to a device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ...engine import Engine, Event

if TYPE_CHECKING:
    from .reader import EpochReader

# Values that every microbatch gets as they are: one value for the whole batch.
_SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


def read_batches(
    engine: Engine, reader: EpochReader, before: Event | None = None, after: Event | None = None, start: int = 0
) -> Iterator[Any]:
    """Yield each batch of an epoch on the device, with the event before and after it is fetched.

    Args:
        engine: The timestamp of its state tells the epoch.
        reader: Reads the batches.
        before: Runs before a batch is fetched; None for no event.
        after: Runs after it. Rows are counted after this event, as algorithms may change the batch.
        start: Number of batches to skip at the beginning of the epoch.

    Raises:
        ValueError: If an algorithm changes the number of rows on several ranks, whose batches would no longer
            be weighted by their rows.
    """
    state, stream = engine.state, copy_stream(engine.state.device)
    with closing(reader.batches(int(state.timestamp.epoch), int(start))) as iterator:
        while True:
            if before is not None:
                engine.run_event(before)
            batch, num_global = next(iterator, (None, 0))
            if num_global == 0:
                return
            state.global_batch_num_samples, state.batch_fingerprint = num_global, reader.batch_digest
            num_local = state.batch_num_samples = num_global if state.world_size == 1 else num_samples(batch)
            state.batch = move(batch, state.device, stream)
            if after is not None and engine.run_event(after):  # an algorithm ran
                _count_again(engine, num_local, after)
            yield state.batch


def num_samples(batch: Any) -> int:
    """The number of rows of a batch: the first dimension, which all its tensors share.

    Args:
        batch: A tensor ``(N, ...)``, or mappings, dataclasses, tuples and lists of them.

    Raises:
        ValueError: If there is no tensor inside, or their first dimensions differ.
    """
    sizes = [tensor.shape[0] if tensor.dim() else 0 for tensor in _tensors(batch)]
    if not sizes:
        raise ValueError(
            f"a batch must be (inputs, targets), or another container of tensors; got a {type(batch).__name__} "
            "without tensors"
        )
    if min(sizes) != max(sizes):
        raise ValueError(f"all tensors of a batch must have the same first dimension, got {_describe_sizes(batch)}")
    if sizes[0] == 0:
        raise ValueError(f"a batch must have at least one row, got {_describe_sizes(batch)}")
    return sizes[0]


def split(batch: Any, size: int) -> Iterator[Any]:
    """The microbatches of `size` rows; the last one may be smaller. Containers keep their type.

    Tensors, arrays, and lists and tuples without tensors are split by rows. Strings, numbers and None are the same
    in every microbatch.

    Raises:
        ValueError: If something else is in the batch, or a list that has not one element for each row.
    """
    rows = num_samples(batch)
    if size >= rows:
        yield batch
        return
    for start in range(0, rows, size):
        yield _take_rows(batch, slice(start, start + size), rows, "batch")


def concatenate(parts: Sequence[Any]) -> Any:
    """One batch of the rows of several, the inverse of `split`. What has no rows is that of the first."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts)) if first.dim() else first
    values = _values(first)
    if values is None:
        return first
    columns = zip(*(_values(part) or () for part in parts), strict=True)
    return _with_values(first, [concatenate(column) for column in columns])


def copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream in which batches are copied while the step before still runs; None on other devices than GPUs."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def move(batch: Any, device: torch.device, stream: torch.cuda.Stream | None = None) -> Any:
    """The batch on `device`, without waiting for copies from pinned memory. Containers keep their type.

    Besides tensors, other values with a method ``to`` are moved by it.

    Args:
        batch: A tensor, or a container of tensors.
        device: Where it is needed.
        stream: Copies tensors from the host, independently of what the current stream still computes; what the
            current stream is given next waits for them.
    """
    values = _values(batch)
    if values is not None:
        return _with_values(batch, [move(value, device, stream) for value in values])
    if isinstance(batch, Tensor):
        if stream is None or batch.device.type != "cpu":
            return batch.to(device, non_blocking=True)
        return _copy(batch, device, stream)
    return batch.to(device) if callable(getattr(batch, "to", None)) and not isinstance(batch, type) else batch


def detach(batch: Any) -> Any:
    """The batch without the graph of its tensors. Containers keep their type."""
    if isinstance(batch, Tensor):
        return batch.detach()
    values = _values(batch)
    return batch if values is None else _with_values(batch, [detach(value) for value in values])


def _copy(tensor: Tensor, device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    current = torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copied = tensor.to(device, non_blocking=True)
    current.wait_stream(stream)
    copied.record_stream(current)  # or its memory could be used for the next copy while the step still reads it
    return copied


def _count_again(engine: Engine, before: int, event: Event) -> None:
    """Count the rows of a batch that an algorithm may have changed."""
    state = engine.state
    rows = num_samples(state.batch)
    if rows == before:
        return
    if state.world_size > 1:
        raise ValueError(
            f"algorithms must keep the number of rows of a batch on several ranks, {event.name} changed it from "
            f"{before} to {rows} on rank {state.rank} with world_size={state.world_size}"
        )
    state.batch_num_samples = state.global_batch_num_samples = rows


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
        return
    for value in _values(batch) or ():
        yield from _tensors(value)


def _values(batch: Any) -> Sequence[Any] | None:
    """The values in a container, in order; None if `batch` is not a container."""
    if isinstance(batch, Tensor):
        return None
    if isinstance(batch, (tuple, list)):
        return None if isinstance(batch, (torch.Size, PackedSequence)) else batch
    if isinstance(batch, Mapping):
        return list(batch.values())
    if is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, field.name) for field in fields(batch)]
    return None


def _with_values(batch: Any, values: list[Any]) -> Any:
    """A container of the same type and with the same attributes, with other values."""
    if type(batch) is tuple:
        return tuple(values)
    if type(batch) is list:
        return values
    if isinstance(batch, tuple):
        return batch._make(values) if hasattr(batch, "_make") else type(batch)(values)
    if isinstance(batch, Mapping) and not isinstance(batch, MutableMapping):
        return type(batch)(dict(zip(batch, values, strict=True)))  # type: ignore[call-arg]  # as dict does
    changed = copy.copy(batch)  # which keeps what else the object has, such as a default_factory
    if isinstance(changed, list):
        changed[:] = values
    elif isinstance(changed, MutableMapping):
        for key, value in zip(list(batch.keys()), values, strict=True):
            changed[key] = value
    else:
        for field, value in zip(fields(batch), values, strict=True):
            object.__setattr__(changed, field.name, value)  # also where the dataclass is frozen
    return changed


def _places(batch: Any) -> list[str]:
    """How to write the position of each value of a container."""
    if isinstance(batch, Mapping):
        return [f"[{key!r}]" for key in batch]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return [f".{name}" for name in batch._fields]
    if isinstance(batch, (tuple, list)):
        return [f"[{number}]" for number in range(len(batch))]
    return [f".{field.name}" for field in fields(batch)]


def _describe_sizes(batch: Any, place: str = "batch") -> str:
    """The shapes of all tensors, with their positions."""
    if isinstance(batch, Tensor):
        return f"{place} of shape {tuple(batch.shape)}"
    values = _values(batch)
    if values is None:
        return ""
    texts = [_describe_sizes(value, place + at) for at, value in zip(_places(batch), values, strict=True)]
    return ", ".join(text for text in texts if text)


def _take_rows(value: Any, part: slice, rows: int, place: str) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        if not value.ndim or len(value) != rows:
            _refuse(place, f"has shape {tuple(value.shape)}", rows)
        return value[part]
    values = _values(value)
    if values is None:
        if isinstance(value, _SCALARS):
            return value
        raise ValueError(
            f"a batch must hold tensors, arrays, lists, strings and numbers to be split into microbatches, {place} is "
            f"a {type(value).__name__}"
        )
    is_sequence = isinstance(value, (tuple, list)) and not hasattr(value, "_fields")
    if is_sequence and value and next(_tensors(value), None) is None and _is_list_of_rows(value, rows, place):
        return _with_values(value, list(value)[part])
    taken = [_take_rows(item, part, rows, place + at) for at, item in zip(_places(value), values, strict=True)]
    return _with_values(value, taken)


def _is_list_of_rows(value: Sequence[Any], rows: int, place: str) -> bool:
    """Whether a list without tensors has an element for each row, rather than elements that do.

    Both occur: a custom collate function may return a list of captions, and torch's ``default_collate`` turns samples
    with lists of strings into a list of tuples, one for each position in these lists.
    """
    are_columns = all(_has_rows(item, rows) for item in value)
    if len(value) == rows and are_columns:
        raise ValueError(
            f"{place} must be a list with one element for each row, or a list of lists that have one; with {rows} rows "
            "it can be read as either, so it cannot be split into microbatches"
        )
    if len(value) != rows and not are_columns:
        _refuse(place, f"has {len(value)}", rows)
    return len(value) == rows


def _has_rows(value: Any, rows: int) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(_has_rows(item, rows) for item in value.values())
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and len(value) == rows
    return isinstance(value, (tuple, list)) and len(value) == rows


def _refuse(place: str, found: str, rows: int) -> NoReturn:
    raise ValueError(
        f"{place} must have one element for each of the {rows} rows to be split into microbatches, it {found}"
    )
