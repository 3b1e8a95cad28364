"""Reads dataloaders so that a run can stop and go on anywhere, and shares every batch out to the ranks."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import accumulate, count
from typing import Any

import torch
from torch.utils import data
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info

from ..reproducibility import generators_kept, hashed_seeds, seed_generators
from . import batches
from .workers import WorkerInit, end_workers, tracked

_log = logging.getLogger(__name__)


class EpochReader:
    """Reads a dataloader so that every batch is a function of seed, epoch and position alone.

    It does not matter how many workers load, what else has drawn from the global generators, or where in the epoch
    the reading began; and reading leaves the global generators of python, numpy and torch's CPU as they were. What
    a dataset, a sampler or a collate_fn draws from them is a function of seed, epoch and position too. Generators
    that they keep for themselves are not looked after, but for a torch one in the `generator` of the dataloader or
    of a sampler: its initial seed counts, and its state is put back.

    A DataLoader over a map-style dataset is rebuilt with all its settings: it begins anywhere without loading what
    was before, and each rank loads its rows only. Anything else is read in order, from the beginning of the epoch,
    on a single rank; a state that it carries from epoch to epoch is its own, and so is what its workers draw, which
    depends on how many they are.

    Workers ignore SIGTERM and SIGINT, so that the step that runs when these arrive can be finished; the main process
    ends them.

    Args:
        dataloader: Yields the batches of an epoch.
        name: What errors call it: ``"train_dataloader"`` or ``"eval_dataloader"``.
        seed: From 0 to 2**32 - 1.
        rank: Which part of every batch is read, from 0 to `world_size` - 1.
        world_size: How many parts every batch has. Several ranks see the batches that a single one sees.
        for_training: Whether to refuse batches that cannot be shared out. For evaluation they are joined to a
            neighbour instead, so that every sample is read exactly once on any number of ranks.
        equal_shares: Whether every rank must get as many rows of every batch.

    Raises:
        ValueError: If batches come in any order (``in_order=False``) or cannot be shared out.
    """

    def __init__(
        self,
        dataloader: Iterable[Any],
        *,
        name: str,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        for_training: bool,
        equal_shares: bool = False,
    ) -> None:
        if isinstance(dataloader, DataLoader) and dataloader.num_workers and not dataloader.in_order:
            raise ValueError(f"{name} must have in_order=True, or no run could be repeated or resumed, got False")
        if world_size > 1:
            _check_shares(dataloader, name, world_size, for_training, equal_shares)
        self._dataloader, self._name, self._seed = dataloader, name, seed
        self._rank, self._world_size, self._for_training = rank, world_size, for_training
        self._equal_shares = equal_shares
        self._requests = _Requests()
        self._loader = _rebuilt(dataloader, self._requests, seed) if _is_map_style(dataloader) else None

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, int]]:
        """Read an epoch from batch number `start` on; close the iterator to stop early.

        Args:
            epoch: The number of the epoch, from 0.
            start: How many batches to leave out, from 0 to all of them. They are read and thrown away, with a
                warning in the log, unless the dataloader is a list or a DataLoader over a map-style dataset.

        Yields:
            This rank's rows of the batch, and how many rows it has over all ranks.

        Raises:
            ValueError: If the epoch has fewer than `start` batches, or rows of a batch cannot be counted or shared.
        """
        if self._loader is not None:
            return self._load(self._loader, epoch, start)
        if isinstance(self._dataloader, (list, tuple)) and type(self._dataloader) in (list, tuple):
            return self._take(self._dataloader, epoch, start)
        return self._replay(epoch, start)

    def _load(self, loader: DataLoader[Any], epoch: int, start: int) -> Iterator[tuple[Any, int]]:
        plan = self._list_batches(epoch)
        self._check_start(start, len(plan), epoch)
        firsts = accumulate(map(len, plan), initial=0)  # the number in the epoch of each batch's first sample
        parts = [self._part(epoch, first, batch) for first, batch in zip(firsts, plan, strict=False)][start:]
        self._requests.of_epoch = [part[-1] for part in parts] if _draws_nothing(self._dataloader) else parts
        loader.generator.manual_seed(hashed_seeds(self._seed, epoch)[1])
        iterator = tracked(iter(loader))
        try:
            if self._world_size == 1:
                for batch in self._handed_over(iterator):
                    yield batch, batches.num_samples(batch)
            else:
                for part, indices, batch in zip(parts, plan[start:], self._handed_over(iterator), strict=True):
                    self._check_rows(batch, len(part[-1]))
                    yield batch, len(indices)
        finally:
            if not loader.persistent_workers:
                end_workers(iterator)

    def _handed_over(self, iterator: Any) -> Iterator[Any]:
        """The batches, with a clear error where a worker dies while it hands one over."""
        try:
            yield from iterator
        except (ConnectionError, EOFError) as error:
            if "in DataLoader worker process" in str(error):  # raised by the dataset, which torch passes on
                raise
            raise RuntimeError(f"a worker of {self._name} died while it handed over a batch") from error

    def _list_batches(self, epoch: int) -> list[list[Any]]:
        """The samples of every batch of an epoch, over all ranks."""
        own = _own_generators(self._dataloader)
        with generators_kept(own):
            seed_generators(self._seed, epoch, _ORDER, own=own)
            _set_epoch(self._dataloader, epoch)
            plan = [list(indices) for indices in self._dataloader.batch_sampler]  # type: ignore[attr-defined]
        if self._world_size > 1 and not self._for_training:
            plan = _joined(plan, self._world_size)
        for number, indices in enumerate(plan):
            if self._equal_shares and len(indices) % self._world_size:
                raise ValueError(
                    f"{self._name} must have batches that world_size={self._world_size} divides, "
                    f"batch {number} of epoch {epoch} has {len(indices)} rows; use drop_last=True"
                )
            if len(indices) < self._world_size:
                raise ValueError(
                    f"{self._name} must have batches of at least world_size={self._world_size} rows, "
                    f"batch {number} of epoch {epoch} has {len(indices)}"
                )
        return plan

    def _part(self, epoch: int, first: int, indices: list[Any]) -> tuple[int, int, list[Any]]:
        """The epoch, the number in it of this rank's first sample of a batch, and all of this rank's samples."""
        begin, end = (len(indices) * rank // self._world_size for rank in (self._rank, self._rank + 1))
        return epoch, first + begin, indices[begin:end]

    def _take(self, listed: list[Any] | tuple[Any, ...], epoch: int, start: int) -> Iterator[tuple[Any, int]]:
        """Batches that lie ready in memory, which draws nothing."""
        self._check_start(start, len(listed), epoch)
        for batch in listed[start:]:
            yield batch, batches.num_samples(batch)

    def _replay(self, epoch: int, start: int) -> Iterator[tuple[Any, int]]:
        if start:
            _log.warning(
                "%s is read again from the beginning of epoch %d and its first %d batches are thrown away: only a "
                "torch DataLoader over a map-style dataset can begin in the middle",
                *(self._name, epoch, start),
            )
        source, iterator = _with_new_workers(self._dataloader), None
        own = _own_generators(source)
        _set_epoch(source, epoch)
        try:
            for number in count():
                with generators_kept(own):
                    seed_generators(self._seed, epoch, _READ, number, own=own)
                    if iterator is None:
                        iterator = tracked(iter(source))
                    batch = next(iterator, _END)
                if batch is _END:
                    self._check_start(start, number, epoch)
                    return
                if number >= start:
                    yield batch, batches.num_samples(batch)
        finally:
            end_workers(iterator)

    def _check_start(self, start: int, length: int, epoch: int) -> None:
        if not 0 <= start <= length:
            raise ValueError(
                f"{self._name} must have the {start} batches of epoch {epoch} that are finished, it has {length}"
            )

    def _check_rows(self, batch: Any, asked: int) -> None:
        rows = batches.num_samples(batch)
        if rows != asked:
            raise ValueError(
                f"{self._name} must have a collate_fn that makes one row of each sample to be shared by "
                f"world_size={self._world_size} ranks, got {rows} rows of {asked} samples"
            )


_ORDER, _SAMPLE, _READ = range(3)  # what is drawn: different seeds for each
_END = object()


class _Requests:
    """The batch sampler of a rebuilt DataLoader: yields what the reader has put in for the epoch."""

    of_epoch: list[Any]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.of_epoch)


class _SeededDataset(Dataset[Any]):
    """Whole batches of a dataset, with the global generators seeded for each sample.

    A request is ``(epoch, the number in the epoch of the first sample, indices)``. Seeds come from the place in the
    epoch and not from the index, as a sampler may give one index twice, to be augmented in two ways.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any], seed: int) -> None:
        self.user_dataset, self._collate_fn, self._seed = dataset, collate_fn, seed

    def __getitems__(self, request: tuple[int, int, list[Any]]) -> Any:
        if get_worker_info() is not None:  # nobody else draws in a worker
            return self._load(*request)
        with generators_kept():
            return self._load(*request)

    def _load(self, epoch: int, first: int, indices: list[Any]) -> Any:
        samples = []
        for number, index in enumerate(indices, first):
            seed_generators(self._seed, epoch, _SAMPLE, number)
            samples.append(self.user_dataset[index])
        return self._collate_fn(samples)  # and draws on from where the last sample has left the generators


def _is_map_style(dataloader: Any) -> bool:
    """Whether batches are lists of indices, listed by a sampler that ends."""
    if not _is_plain(dataloader) or dataloader.batch_sampler is None:
        return False
    if isinstance(dataloader.dataset, IterableDataset):
        return False
    try:
        len(dataloader)
    except TypeError:
        return False
    return True


def _is_plain(dataloader: Any) -> bool:
    """Whether it is a DataLoader that iterates as torch's own."""
    return isinstance(dataloader, DataLoader) and type(dataloader).__iter__ is DataLoader.__iter__


def _draws_nothing(dataloader: Any) -> bool:
    """Whether samples are known to be made without randomness; seeding for each takes longer than reading it."""
    dataset = dataloader.dataset
    if type(dataset) is data.Subset:
        dataset = dataset.dataset
    return type(dataset) is data.TensorDataset and dataloader.collate_fn is data.default_collate


def _rebuilt(dataloader: Any, requests: _Requests, seed: int) -> DataLoader[Any]:
    """The same DataLoader, for the requests of a reader."""
    dataset, collate_fn = dataloader.dataset, dataloader.collate_fn
    if not _draws_nothing(dataloader):
        dataset, collate_fn = _SeededDataset(dataset, collate_fn, seed), _identity
    return DataLoader(
        dataset,
        batch_sampler=requests,  # lists of indices, or what _SeededDataset takes for them
        collate_fn=collate_fn,
        num_workers=dataloader.num_workers,
        pin_memory=dataloader.pin_memory,
        timeout=dataloader.timeout,
        worker_init_fn=WorkerInit(dataloader.worker_init_fn),
        multiprocessing_context=dataloader.multiprocessing_context,
        generator=torch.Generator(),  # or making an iterator would draw from the global one
        prefetch_factor=dataloader.prefetch_factor,
        persistent_workers=dataloader.persistent_workers,
    )


def _identity(batch: Any) -> Any:
    return batch


def _with_new_workers(dataloader: Any) -> Any:
    """A DataLoader that starts its workers anew, as those that live on have drawn in the epoch before."""
    if not _is_plain(dataloader) or dataloader.num_workers == 0:
        return dataloader
    dataloader = copy.copy(dataloader)
    dataloader._iterator = None
    dataloader.worker_init_fn = WorkerInit(dataloader.worker_init_fn)
    return dataloader


def _parts(dataloader: Any) -> list[Any]:
    """A dataloader and its samplers, however deep one wraps another."""
    parts = [dataloader]
    if isinstance(dataloader, DataLoader):
        for part in parts:  # which grows
            inner = (getattr(part, name, None) for name in ("batch_sampler", "sampler"))
            parts += [new for new in inner if new is not None and all(new is not known for known in parts)]
    return parts


def _own_generators(dataloader: Any) -> list[torch.Generator]:
    found = {id(own): own for part in _parts(dataloader) if (own := getattr(part, "generator", None)) is not None}
    return [own for own in found.values() if isinstance(own, torch.Generator) and own is not torch.default_generator]


def _set_epoch(dataloader: Any, epoch: int) -> None:
    for part in _parts(dataloader):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def _joined(plan: list[list[Any]], least: int) -> list[list[Any]]:
    """The same samples in the same order, in batches of at least `least` where there are so many."""
    joined: list[list[Any]] = []
    for indices in plan:
        if joined and len(joined[-1]) < least:
            joined[-1] += indices
        else:
            joined.append(indices)
    if len(joined) > 1 and len(joined[-1]) < least:
        joined[-2:] = [joined[-2] + joined[-1]]
    return joined


def _check_shares(dataloader: Any, name: str, world_size: int, for_training: bool, equal: bool) -> None:
    """Refuse what is known beforehand not to give every rank its share of every batch."""
    if not _is_map_style(dataloader):
        raise ValueError(
            f"{name} must be a torch DataLoader over a map-style dataset, with a length, to be shared by "
            f"world_size={world_size} ranks, got a {type(dataloader).__name__} that is none"
        )
    if any(isinstance(part, DistributedSampler) for part in _parts(dataloader)):
        raise ValueError(
            f"{name} must have no DistributedSampler, as the Trainer gives each of world_size={world_size} ranks its "
            f"part of every batch; use shuffle=True or a RandomSampler"
        )
    for samples in (dataloader.dataset, getattr(dataloader.batch_sampler, "sampler", None)):
        if isinstance(samples, Sized) and len(samples) < world_size:
            raise ValueError(
                f"{name} must have at least one sample for each of world_size={world_size} ranks, got {len(samples)}"
            )
    if for_training:
        _check_sizes(dataloader.batch_sampler, name, world_size, equal)


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
