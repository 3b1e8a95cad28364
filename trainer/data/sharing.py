"""How the batches of an epoch are divided among the ranks."""

import zlib
from array import array
from collections.abc import Iterator, Sized
from typing import Any, NamedTuple

from torch.utils.data import DistributedSampler

from .sampling import is_map_style, is_plain, parts


class Shares(NamedTuple):
    """The rule by which ranks share batches.

    Args:
        name: Name of the dataloader in error messages.
        rank: Which share is read, from 0 to `world_size` - 1.
        world_size: How many shares every batch has.
        for_training: Whether batches that cannot be shared are an error. For evaluation they are merged with a
            neighbour instead, so that every sample is read exactly once on any number of ranks.
        equal: Whether every rank must get the same number of rows of every batch.
    """

    name: str
    rank: int
    world_size: int
    for_training: bool
    equal: bool

    def check(self, dataloader: Any) -> None:
        """Check, as far as possible without reading, that the batches of a dataloader can be shared.

        Raises:
            ValueError: With the reason and the remedy.
        """
        if self.world_size > 1:
            _check_kind(dataloader, self.name, self.world_size)
        if self.world_size > 1 and self.for_training:
            _check_sizes(dataloader.batch_sampler, self.name, self.world_size, self.equal)

    def prepare(self, plan: Iterator[list[Any]], epoch: int) -> Iterator[list[Any]]:
        """Yield batches that have rows for every rank.

        Args:
            plan: The indices of each batch of an epoch.
            epoch: Number of the epoch, for errors.

        Raises:
            ValueError: If a batch has too few rows, or its rows cannot be divided equally where they must.
        """
        if self.world_size == 1:
            yield from plan
            return
        if not self.for_training:
            plan = merge_small(plan, self.world_size)
        for number, indices in enumerate(plan):
            if self.equal and len(indices) % self.world_size:
                raise ValueError(
                    f"{self.name} must have batches that world_size={self.world_size} divides, "
                    f"batch {number} of epoch {epoch} has {len(indices)} rows; use drop_last=True"
                )
            if len(indices) < self.world_size:
                raise ValueError(
                    f"{self.name} must have batches of at least world_size={self.world_size} rows, "
                    f"batch {number} of epoch {epoch} has {len(indices)}"
                )
            yield indices

    def begin(self, num_rows: int) -> int:
        """The number of the first row of a batch that this rank reads."""
        return num_rows * self.rank // self.world_size

    def end(self, num_rows: int) -> int:
        """The number after that of the last row of a batch that this rank reads."""
        return num_rows * (self.rank + 1) // self.world_size


def digest(indices: list[Any]) -> int:
    """A number in [0, 2**32) that differs, nearly always, where ranks would read other samples for a batch."""
    try:
        return zlib.crc32(array("q", indices).tobytes())
    except (TypeError, OverflowError):  # keys that are not ints; the repr of an object may contain its address
        texts = [repr(index) if isinstance(index, (str, bytes, int, tuple)) else type(index) for index in indices]
        return zlib.crc32(repr(texts).encode())


def merge_small(plan: Iterator[list[Any]], least: int) -> Iterator[list[Any]]:
    """The same indices in the same order, in batches of at least `least` rows if there are that many."""
    held: list[list[Any]] = []  # at most one batch that is large enough, and behind it one that grows
    for indices in plan:
        if held and len(held[-1]) < least:
            held[-1] = held[-1] + indices
        else:
            held.append(indices)
        if len(held) == 2 and len(held[1]) >= least:
            yield held.pop(0)
    if len(held) == 2:  # the rest is too small
        held = [held[0] + held[1]]
    yield from held


def _check_kind(dataloader: Any, name: str, world_size: int) -> None:
    if not is_map_style(dataloader):
        what = f" over a {type(dataloader.dataset).__name__}" if is_plain(dataloader) else ""
        raise ValueError(
            f"{name} must be a torch DataLoader over a map-style dataset, with batches, to be shared by "
            f"world_size={world_size} ranks, got a {type(dataloader).__name__}{what}"
        )
    if any(isinstance(part, DistributedSampler) for part in parts(dataloader)):
        raise ValueError(
            f"{name} must have no DistributedSampler, as the Trainer gives each of world_size={world_size} ranks its "
            f"part of every batch; use shuffle=True or a RandomSampler"
        )
    for samples in (dataloader.dataset, getattr(dataloader.batch_sampler, "sampler", None)):
        if isinstance(samples, Sized) and len(samples) < world_size:
            raise ValueError(
                f"{name} must have at least one sample for each of world_size={world_size} ranks, got {len(samples)}"
            )


def _check_sizes(sampler: Any, name: str, world_size: int, equal: bool) -> None:
    size = getattr(sampler, "batch_size", None)
    if not isinstance(size, int):
        return
    if size % world_size:
        raise ValueError(f"{name} must have a batch_size that world_size={world_size} divides, got {size}")
    inner: Any = getattr(sampler, "sampler", None)
    if getattr(sampler, "drop_last", True) or not isinstance(inner, Sized):
        return
    rest = len(inner) % size
    if equal and rest % world_size:
        raise ValueError(
            f"{name} must have a last batch that world_size={world_size} divides, as microbatches with "
            f"parallelism='fsdp' or sync_batchnorm need it, got {rest} left of {len(inner)} samples; use drop_last=True"
        )
    if 0 < rest < world_size:
        raise ValueError(
            f"{name} must have a last batch with a row for each of world_size={world_size} ranks, got {rest} left of "
            f"{len(inner)} samples in batches of {size}; use drop_last=True or another batch_size"
        )
