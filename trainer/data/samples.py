"""The samples of a batch, loaded in any process with the generators seeded for each of them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import data
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..reproducibility import generators_kept, seed_generators
from .sampling import SAMPLE
from .workers import WorkerInit


class Request(NamedTuple):
    """The samples of a batch that this rank reads.

    Args:
        epoch: Number of the epoch.
        first: Position of the first sample in the epoch, over all ranks.
        indices: Of the samples.
    """

    epoch: int
    first: int
    indices: list[Any]


class Requests:
    """The batch sampler of a rebuilt DataLoader: yields the requests that the reader sets for an epoch."""

    of_epoch: Iterator[Request]

    def __init__(self) -> None:
        self.draws_nothing = False

    def __iter__(self) -> Iterator[Any]:
        for request in self.of_epoch:
            yield request.indices if self.draws_nothing else tuple(request)


def rebuild(dataloader: Any, requests: Requests, seed: int) -> DataLoader[Any]:
    """A DataLoader with the same settings that loads the batches of `requests`."""
    dataset, collate_fn = dataloader.dataset, dataloader.collate_fn
    requests.draws_nothing = _draws_nothing(dataloader)
    whole_batches = _TensorRows(dataset) if requests.draws_nothing else _SeededDataset(dataset, collate_fn, seed)
    return DataLoader(
        whole_batches,
        batch_sampler=requests,  # lists of indices, or what _SeededDataset takes for them
        collate_fn=_identity,
        num_workers=dataloader.num_workers,
        pin_memory=dataloader.pin_memory,
        timeout=dataloader.timeout,
        worker_init_fn=WorkerInit(dataloader.worker_init_fn),
        multiprocessing_context=dataloader.multiprocessing_context,
        generator=torch.Generator(),  # else making an iterator would draw from the global one
        prefetch_factor=dataloader.prefetch_factor,
        persistent_workers=dataloader.persistent_workers,
    )


def iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a rebuilt DataLoader, as its own iterator gives them.

    Without workers and pinned memory that iterator would only fetch and collate, at a cost per batch that small
    batches feel, so it is done here.
    """
    if loader.num_workers > 0 or loader.pin_memory:
        return iter(loader)
    assert loader.batch_sampler is not None, "a rebuilt DataLoader has one"
    dataset: Any = loader.dataset
    return map(dataset.__getitems__, loader.batch_sampler)


class _TensorRows(Dataset[Any]):
    """Whole batches of a TensorDataset, or of a subset of one, as `default_collate` makes them of its samples."""

    def __init__(self, dataset: Any) -> None:
        self.user_dataset = dataset

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        dataset: Any = self.user_dataset  # its tensors may be replaced between epochs
        chosen = indices
        if isinstance(dataset, data.Subset):
            chosen, dataset = [dataset.indices[index] for index in indices], dataset.dataset
        rows = torch.tensor(chosen)
        return [tensor[rows] for tensor in dataset.tensors]


class _SeededDataset(Dataset[Any]):
    """Whole batches of a dataset, with the global generators seeded for each sample.

    Seeds come from the position in the epoch and not from the index: a sampler may give one index twice, to be
    augmented in two ways. A dataset that only has ``__getitems__`` loads its samples together, with the seed of
    the first one.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any], seed: int) -> None:
        self.user_dataset, self._collate_fn, self._seed = dataset, collate_fn, seed
        self._loads_together = not _has_single_items(dataset) and callable(getattr(dataset, "__getitems__", None))

    def __getitems__(self, request: tuple[int, int, list[Any]]) -> Any:
        if get_worker_info() is not None:  # nothing else draws in a worker
            return self._load(*request)
        with generators_kept():
            return self._load(*request)

    def _load(self, epoch: int, first: int, indices: list[Any]) -> Any:
        if self._loads_together:
            seed_generators(self._seed, epoch, SAMPLE, first)
            return self._collate_fn(self.user_dataset.__getitems__(indices))
        samples = []
        for number, index in enumerate(indices, first):
            seed_generators(self._seed, epoch, SAMPLE, number)
            samples.append(self.user_dataset[index])
        return self._collate_fn(samples)  # draws from the state of the generators after the last sample


def _has_single_items(dataset: Any) -> bool:
    """Whether a dataset has a ``__getitem__`` besides the one of torch's base class, which raises."""
    if type(dataset) is data.Subset:
        return _has_single_items(dataset.dataset)
    own = getattr(type(dataset), "__getitem__", None)
    return own is not None and own is not Dataset.__getitem__


def _draws_nothing(dataloader: Any) -> bool:
    """Whether samples are known to be deterministic; seeding for each takes longer than reading it."""
    dataset = dataloader.dataset
    if type(dataset) is data.Subset:
        dataset = dataset.dataset
    if type(dataset) is not data.TensorDataset or dataloader.collate_fn is not data.default_collate:
        return False
    return all(type(tensor) is Tensor for tensor in dataset.tensors)


def _identity(batch: Any) -> Any:
    return batch
