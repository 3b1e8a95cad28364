"""Reads dataloaders so that a run can be resumed at any batch, and divides every batch among the ranks."""

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import count
from typing import Any

from torch.utils.data import DataLoader

from ..reproducibility import generators_kept, hashed_seeds, seed_generators
from ..torch_internals import without_workers
from . import batches
from .samples import Request, Requests, iterate, rebuild
from .sampling import READ, is_map_style, is_plain, list_batches, num_batches, own_generators, set_epoch
from .sharing import Shares, digest
from .workers import WorkerInit, end_workers, tracked

_log = logging.getLogger(__name__)

_END = object()

Shared = tuple[Any, int]  # this rank's rows of a batch, and how many rows it has over all ranks


class EpochReader:
    """Reads a dataloader so that every batch is a function of seed, epoch and position in the epoch alone.

    It does not depend on the number of loader workers, on what else draws from the global generators, or on the
    batch at which reading starts. Reading leaves the global generators of python, numpy and torch's CPU as they
    were. What a dataset, a sampler or a collate_fn draws from them is a function of seed, epoch and position, too.
    Generators that they keep for themselves are not managed, except a torch one in the `generator` of the
    dataloader or of a sampler: its initial seed is used, and its state is restored.

    A DataLoader over a map-style dataset is rebuilt with all its settings: it starts anywhere without loading the
    batches before, and each rank loads its rows only. Anything else is read in order, from the beginning of the
    epoch, on a single rank; state that it keeps between epochs is not managed, and what its workers draw depends
    on their number.

    Workers ignore SIGTERM and SIGINT, so that the current step can be finished; the main process ends them.

    Args:
        dataloader: Yields the batches of an epoch.
        name: Its name in error messages: ``"train_dataloader"`` or ``"eval_dataloader"``.
        seed: In [0, 2**32).
        rank: Which share of every batch is read, from 0 to `world_size` - 1.
        world_size: How many shares every batch has. Several ranks see the batches that a single one sees.
        for_training: Whether batches that cannot be shared are an error. For evaluation they are merged with a
            neighbour instead, so that every sample is read exactly once on any number of ranks.
        equal_shares: Whether every rank must get the same number of rows of every batch.

    Raises:
        ValueError: If batches come in any order (``in_order=False``) or cannot be shared.
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
        self._shares = Shares(name, rank, world_size, for_training, equal_shares)
        self._shares.check(dataloader)
        self._dataloader, self._name, self._seed = dataloader, name, seed
        self._requests = Requests()
        self._loader = rebuild(dataloader, self._requests, seed) if is_map_style(dataloader) else None
        self._digest = 0
        self._running: EpochIterator | None = None
        self._known_end: tuple[int, int, bool] | None = None

    @property
    def num_batches(self) -> int | None:
        """The number of batches of every epoch, None where it is unknown or may be an estimate."""
        return num_batches(self._dataloader)

    @property
    def batch_digest(self) -> int:
        """A checksum in [0, 2**32) of the indices, over all ranks, of the batch that was yielded last.

        It is equal on all ranks unless a sampler orders the samples differently on each. 0 on a single rank.
        """
        return self._digest

    def is_at_end(self, epoch: int, number: int) -> bool:
        """Whether an epoch ends after `number` batches.

        Where its length is not known exactly, this is found out by reading on.
        """
        if self.num_batches is not None:
            return number == self.num_batches
        if self._known_end is None or self._known_end[:2] != (epoch, number):
            if self._running is not None and (self._running.epoch, self._running.number) == (epoch, number):
                self._known_end = epoch, number, not self._running.has_next()
            else:
                with closing(self.batches(epoch, number)) as iterator:
                    self._known_end = epoch, number, not iterator.has_next()
        return self._known_end[2]

    def batches(self, epoch: int, start: int = 0) -> "EpochIterator":
        """Read an epoch from batch number `start` on; close the iterator to stop early.

        Args:
            epoch: The number of the epoch, from 0.
            start: How many batches to skip, from 0 to all of them. They are read and dropped, with a warning in the
                log, unless the dataloader is a list or a DataLoader over a map-style dataset.

        Returns:
            An iterator over this rank's rows of each batch, and how many rows it has over all ranks.

        Raises:
            ValueError: If the epoch has fewer than `start` batches, or rows of a batch cannot be counted or shared.
        """
        if self._loader is not None:
            generator = self._load(self._loader, epoch, start)
        elif type(self._dataloader) in (list, tuple):
            generator = self._take(self._dataloader, epoch, start)  # type: ignore[arg-type]
        else:
            generator = self._replay(epoch, start)
        self._running = EpochIterator(generator, epoch, start)
        return self._running

    def _load(self, loader: DataLoader[Any], epoch: int, start: int) -> Generator[Shared]:
        requested: deque[tuple[int, Request, int]] = deque()  # by workers in advance
        self._requests.of_epoch = self._request(epoch, start, requested)
        assert loader.generator is not None, "a rebuilt DataLoader has one"
        loader.generator.manual_seed(hashed_seeds(self._seed, epoch)[1])
        iterator = tracked(iterate(loader))
        try:
            for batch in self._received(iterator):
                num_global, request, self._digest = requested.popleft()
                if self._requests.draws_nothing:  # rows of tensors, as many as were requested
                    yield batch, num_global
                elif self._shares.world_size == 1:
                    yield batch, batches.num_samples(batch)
                else:
                    self._check_rows(batch, len(request.indices))
                    yield batch, num_global
        finally:
            if not loader.persistent_workers:
                end_workers(iterator)

    def _request(self, epoch: int, start: int, requested: deque[tuple[int, Request, int]]) -> Iterator[Request]:
        """Yield what this rank reads of each batch, and note it in `requested` with its number of rows and digest."""
        shares, first, number = self._shares, 0, 0
        plan = shares.prepare(list_batches(self._dataloader, self._seed, epoch), epoch)
        for number, indices in enumerate(plan, start=1):
            size = len(indices)
            if number > start:
                begin, end = shares.begin(size), shares.end(size)
                request = Request(epoch, first + begin, indices[begin:end])
                requested.append((size, request, digest(indices) if shares.world_size > 1 else 0))
                yield request
            first += size
        self._check_start(start, number, epoch)

    def _received(self, iterator: Any) -> Iterator[Any]:
        """The batches, with a clear error if a worker dies while it sends one."""
        try:
            yield from iterator
        except (ConnectionError, EOFError) as error:
            if "in DataLoader worker process" in str(error):  # raised by the dataset; torch passes it on
                raise
            raise RuntimeError(f"a worker of {self._name} died while it sent a batch") from error

    def _take(self, listed: list[Any] | tuple[Any, ...], epoch: int, start: int) -> Generator[Shared]:
        """Batches in a list or tuple; nothing is drawn."""
        self._check_start(start, len(listed), epoch)
        for batch in listed[start:]:
            yield batch, batches.num_samples(batch)

    def _replay(self, epoch: int, start: int) -> Generator[Shared]:
        if start:
            _log.warning(
                "%s is read again from the beginning of epoch %d to skip its first %d batches: only a torch DataLoader "
                "over a map-style dataset can start in the middle of an epoch",
                *(self._name, epoch, start),
            )
        source, iterator = _with_new_workers(self._dataloader), None
        own = own_generators(source)
        set_epoch(source, epoch)
        try:
            for number in count():
                with generators_kept(own):
                    seed_generators(self._seed, epoch, READ, number, own=own)
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

    def _check_rows(self, batch: Any, expected: int) -> None:
        rows = batches.num_samples(batch)
        if rows != expected:
            raise ValueError(
                f"{self._name} must have a collate_fn that makes one row of each sample to be shared by "
                f"world_size={self._shares.world_size} ranks, got {rows} rows of {expected} samples"
            )


class EpochIterator(Iterator[Shared]):
    """The batches of an epoch that are left.

    Args:
        generator: Yields them.
        epoch: Number of the epoch.
        number: Of the next batch in the epoch.
    """

    def __init__(self, generator: Generator[Shared], epoch: int, number: int) -> None:
        self._generator = generator
        self.epoch, self.number = epoch, number
        self._ahead: list[Shared] = []

    def __next__(self) -> Shared:
        batch = self._ahead.pop() if self._ahead else next(self._generator)
        self.number += 1
        return batch

    def has_next(self) -> bool:
        """Whether there is another batch. It is read to find out, and kept for ``next``."""
        if not self._ahead:
            self._ahead.extend(batch for batch in [next(self._generator, None)] if batch is not None)
        return bool(self._ahead)

    def close(self) -> None:
        """Stop reading, and end the workers unless they are persistent."""
        self._ahead.clear()
        self.number = -1
        self._generator.close()


def _with_new_workers(dataloader: Any) -> Any:
    """A DataLoader that starts new workers, as persistent ones have drawn random numbers in the epoch before."""
    if not is_plain(dataloader) or dataloader.num_workers == 0:
        return dataloader
    dataloader = without_workers(dataloader)
    dataloader.worker_init_fn = WorkerInit(dataloader.worker_init_fn)
    return dataloader
