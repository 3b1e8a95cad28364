"""What the trainer does to batches without knowing what is in them: read, count rows, split, move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...engine import Engine, Event

if TYPE_CHECKING:
    from .reader import EpochReader


def read_batches(engine: Engine, reader: EpochReader, before: Event, after: Event, start: int = 0) -> Iterator[Any]:
    """Yield each batch of an epoch on the device, with the event before and after it is fetched.

    Args:
        engine: Its state's timestamp says which epoch.
        reader: Where from.
        before: Announced before a batch is fetched.
        after: Announced after.
        start: Batches at the beginning that are left out.
    """
    state = engine.state
    iterator = reader.batches(state.timestamp.epoch, start)
    while True:
        engine.run_event(before)
        batch, global_num_samples = next(iterator, (None, 0))
        if global_num_samples == 0:
            return
        state.global_batch_num_samples = global_num_samples
        state.batch_num_samples = global_num_samples if state.world_size == 1 else num_samples(batch)
        state.batch = move(batch, state.device)
        engine.run_event(after)
        yield state.batch


def num_samples(batch: Any) -> int:
    """The number of rows that all tensors of a batch share.

    Args:
        batch: A tensor ``(N, ...)``, or tuples, lists and dictionaries of them.

    Raises:
        ValueError: If there is no tensor inside, or their first dimensions differ.
    """
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in _tensors(batch)}
    if not sizes:
        raise ValueError(
            f"a batch must be (inputs, targets), or another nest of tensors; got a {type(batch).__name__} without any"
        )
    if len(sizes) > 1:
        raise ValueError(f"all tensors of a batch must have the same first dimension, got {sorted(sizes)}")
    (size,) = sizes
    if size == 0:
        raise ValueError("a batch must have at least one row, got tensors with none")
    return size


def split(batch: Any, size: int) -> Iterator[Any]:
    """The microbatches of `size` rows, the last one perhaps smaller."""
    for start in range(0, num_samples(batch), size):
        yield _map(batch, itemgetter(slice(start, start + size)))


def move(batch: Any, device: torch.device) -> Any:
    """The batch on `device`; the host does not wait for pinned memory."""
    return _map(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _map(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: _map(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(value, function) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_map(value, function) for value in batch)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (tuple, list, dict)):
        for value in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(value)
