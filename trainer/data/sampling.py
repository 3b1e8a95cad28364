"""Which samples make up the batches of an epoch: a function of seed, epoch and position in the epoch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..reproducibility import generator_states, generators_kept, seed_generators, set_generator_states

ORDER, SAMPLE, READ = range(3)  # what is drawn: each has its own seeds

_CHUNK = 2**16  # indices that are listed at once, so that the memory for them is bounded
_EXACT_SAMPLERS = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)


def is_map_style(dataloader: Any) -> bool:
    """Whether this is a DataLoader that iterates as torch's own and whose batches are lists of indices."""
    if not is_plain(dataloader) or dataloader.batch_sampler is None:
        return False
    return not isinstance(dataloader.dataset, IterableDataset)


def is_plain(dataloader: Any) -> bool:
    """Whether this is a DataLoader that iterates as torch's own."""
    return isinstance(dataloader, DataLoader) and type(dataloader).__iter__ is DataLoader.__iter__


def num_batches(dataloader: Any) -> int | None:
    """The number of batches of every epoch, None where it is unknown or may be an estimate.

    It is known of lists, and of DataLoaders with torch's own samplers. A length that user code computes may be an
    estimate, as with batches of a maximal number of tokens, or with an IterableDataset and several workers.
    """
    if type(dataloader) in (list, tuple):
        return len(dataloader)
    if not is_map_style(dataloader) or type(dataloader).__len__ is not DataLoader.__len__:
        return None
    sampler = dataloader.batch_sampler
    is_exact = type(sampler) is BatchSampler and type(sampler.sampler) in _EXACT_SAMPLERS
    return len(sampler) if is_exact else None


def list_batches(dataloader: Any, seed: int, epoch: int) -> Iterator[list[Any]]:
    """Yield the indices of the batches of an epoch.

    What samplers draw from the global generators and from their own ones depends on seed and epoch alone, and
    leaves these generators as they were. Batches are listed in chunks: an epoch may be longer than fits into memory.
    """
    generators = _SamplerGenerators(dataloader, seed, epoch)
    with generators.active():
        set_epoch(dataloader, epoch)
        batches = iter(dataloader.batch_sampler)
    is_at_end = False
    while not is_at_end:
        with generators.active():
            chunk, is_at_end = _take_chunk(batches)
        yield from chunk


def own_generators(dataloader: Any) -> list[torch.Generator]:
    """The torch generators that a dataloader and its samplers keep for themselves."""
    found = {id(own): own for part in parts(dataloader) if (own := getattr(part, "generator", None)) is not None}
    return [own for own in found.values() if isinstance(own, torch.Generator) and own is not torch.default_generator]


def set_epoch(dataloader: Any, epoch: int) -> None:
    """Call ``set_epoch`` of a dataloader and its samplers where they have it."""
    for part in parts(dataloader):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def parts(dataloader: Any) -> list[Any]:
    """A dataloader and its samplers, however deep one wraps another."""
    found = [dataloader]
    if isinstance(dataloader, DataLoader):
        for part in found:  # grows meanwhile
            inner = (getattr(part, name, None) for name in ("batch_sampler", "sampler"))
            found += [new for new in inner if new is not None and all(new is not known for known in found)]
    return found


class _SamplerGenerators:
    """The generators as the samplers of one epoch see them, while others draw from them in between."""

    def __init__(self, dataloader: Any, seed: int, epoch: int) -> None:
        self._own = own_generators(dataloader)
        self._key = seed, epoch, ORDER
        self._states: list[Any] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let samplers draw inside; outside, all generators are as they were."""
        with generators_kept(self._own):
            if self._states is None:
                seed_generators(*self._key, own=self._own)
            else:
                global_states, *own_states = self._states
                set_generator_states(global_states, torch.device("cpu"))
                for generator, state in zip(self._own, own_states, strict=True):
                    generator.set_state(state)
            yield
            self._states = [generator_states(torch.device("cpu")), *(own.get_state() for own in self._own)]


def _take_chunk(batches: Iterator[Any]) -> tuple[list[list[Any]], bool]:
    """The next batches, of `_CHUNK` indices or a little more, and whether they are the last ones."""
    chunk: list[list[Any]] = []
    num_indices = 0
    for indices in batches:
        chunk.append(list(indices))
        num_indices += len(chunk[-1])
        if num_indices >= _CHUNK:
            return chunk, False
    return chunk, True
