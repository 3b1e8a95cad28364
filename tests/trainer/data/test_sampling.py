"""Sampling keyed by seed, epoch and index."""

import random
import tracemalloc
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
)

from etude.trainer.data import sampling
from etude.trainer.data.reader import EpochReader
from etude.trainer.data.sampling import list_batches, num_batches
from etude.trainer.data.sharing import digest, merge_small


def reader(dataloader: Any, **settings: Any) -> EpochReader:
    return EpochReader(dataloader, **{"name": "train_dataloader", "seed": 7, "for_training": True, **settings})


def read(dataloader: Any, epoch: int = 0, start: int = 0, **settings: Any) -> list[Any]:
    return [batch for batch, _ in reader(dataloader, **settings).batches(epoch, start)]


class Drawing(Sampler[int]):
    """Draws from python's, torch's and its own generator for every sample, without telling a length."""

    def __init__(self, count: int = 40) -> None:
        self.count, self.generator = count, torch.Generator().manual_seed(5)

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.count):
            own = torch.randint(1000, (), generator=self.generator)
            yield (random.randrange(1000) + int(torch.randint(1000, ())) + int(own)) % 1000


class Growing(Sampler[list[int]]):
    """Batches whose number is not their length, as batches of at most so many tokens are."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([number, number + 1] for number in range(5))


class Stream(IterableDataset[Tensor]):
    """Tells a length, which is that of one worker."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(4.0))


class Together(Dataset[Tensor]):
    """A dataset that only reads several samples at once, with a draw for each."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return 8

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        self.asked.append(indices)
        return [torch.tensor([float(index), torch.rand(()).item()]) for index in indices]


class TestLongEpochs:
    def test_an_epoch_is_not_listed_as_a_whole(self) -> None:
        sampler = RandomSampler(range(1000), replacement=True, num_samples=10**7)
        dataloader: DataLoader[int] = DataLoader(range(1000), 100, sampler=sampler)  # type: ignore[arg-type]
        tracemalloc.start()
        first = [batch.tolist() for batch, _ in islice(reader(dataloader).batches(0), 3)]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**24
        assert len({tuple(batch) for batch in first}) == 3

    @pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
    @pytest.mark.parametrize("start", [0, 1, 9, 10])
    def test_the_order_is_the_same_in_chunks_of_any_size(
        self, monkeypatch: pytest.MonkeyPatch, chunk: int, start: int
    ) -> None:
        def dataloader() -> DataLoader[Any]:
            return DataLoader(range(1000), 4, sampler=Drawing())  # type: ignore[arg-type]

        whole = torch.cat(read(dataloader()))
        assert len(whole.unique()) > 30
        monkeypatch.setattr(sampling, "_CHUNK", chunk)
        states = random.getstate(), torch.get_rng_state()
        found = []
        for batch, _ in reader(dataloader()).batches(0, start):
            found.append(batch)
            random.random()  # others draw meanwhile
            torch.rand(())
        assert torch.equal(torch.cat([*found, whole[:0]]), whole[4 * start :])
        random.setstate(states[0])
        torch.set_rng_state(states[1])

    def test_samplers_leave_their_own_generator_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sampling, "_CHUNK", 4)
        sampler = Drawing()
        before = sampler.generator.get_state()
        batches = list_batches(DataLoader(range(1000), 2, sampler=sampler), 0, 0)  # type: ignore[arg-type]
        for _ in islice(batches, 7):
            assert torch.equal(sampler.generator.get_state(), before)

    def test_a_sampler_without_a_length_or_an_end_starts_anywhere(self) -> None:
        def dataloader() -> DataLoader[Any]:
            return DataLoader(range(1000), 4, sampler=Drawing(10**9))  # type: ignore[arg-type]

        whole = [batch for batch, _ in islice(reader(dataloader()).batches(3), 6)]
        tail = [batch for batch, _ in islice(reader(dataloader()).batches(3, 4), 2)]
        assert torch.equal(torch.cat(tail), torch.cat(whole[4:]))


class TestLengths:
    @pytest.mark.parametrize(
        ("dataloader", "length"),
        [
            ([torch.ones(1)] * 4, 4),
            (DataLoader(range(7), 2), 4),
            (DataLoader(range(7), 2, shuffle=True, drop_last=True), 3),
            (DataLoader(range(7), 2, sampler=RandomSampler(range(7), num_samples=20)), 10),
            (DataLoader(range(7), batch_sampler=BatchSampler(DistributedSampler(range(7), 2, 0), 2, False)), 2),
            (DataLoader(range(7), batch_sampler=Growing()), None),
            (DataLoader(range(7), 2, sampler=Drawing()), None),
            (DataLoader(Stream(), 2), None),
            (DataLoader(range(7), None), None),
            (iter([]), None),
        ],
    )
    def test_the_number_of_batches_is_known_only_where_it_is_exact(self, dataloader: Any, length: int | None) -> None:
        assert num_batches(dataloader) == length

    @pytest.mark.parametrize("dataloader", [DataLoader(range(9), batch_sampler=Growing()), [torch.ones(1)] * 5])
    def test_whether_a_batch_is_left_is_found_by_reading_it(self, dataloader: Any) -> None:
        whole = read(dataloader)
        iterator = reader(dataloader).batches(0)
        for batch in whole:
            assert iterator.has_next()
            assert iterator.has_next()
            assert torch.equal(next(iterator)[0], batch)
        assert not iterator.has_next()
        assert next(iterator, None) is None
        assert not reader(dataloader).batches(0, len(whole)).has_next()


class TestReadingTogether:
    @pytest.mark.parametrize("wrap", [lambda dataset: dataset, lambda dataset: Subset(dataset, range(8))])
    def test_a_dataset_that_only_has_getitems_is_read_a_batch_at_a_time(self, wrap: Any) -> None:
        dataset = Together()
        dataloader = DataLoader(wrap(dataset), 4, shuffle=True)
        whole = read(dataloader, epoch=2)
        assert [len(indices) for indices in dataset.asked] == [4, 4]
        assert sorted(torch.cat(whole)[:, 0].tolist()) == list(range(8))
        assert len(torch.cat(whole)[:, 1].unique()) == 8
        torch.rand(3)
        assert torch.equal(read(dataloader, epoch=2, start=1)[0], whole[1])

    def test_ranks_read_their_part_of_it(self) -> None:
        ranks = [read(DataLoader(Together(), 4, shuffle=True), rank=rank, world_size=2) for rank in range(2)]
        whole = read(DataLoader(Together(), 4, shuffle=True))
        for batch, *shares in zip(whole, *ranks, strict=True):
            assert torch.equal(torch.cat(shares)[:, 0], batch[:, 0])


class Unseeded(Sampler[int]):
    """An order that is not a function of the seed, as of a sampler with a generator of python of its own."""

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def __len__(self) -> int:
        return 64

    def __iter__(self) -> Iterator[int]:
        return iter(self._random.sample(range(64), 64))


class TestDigests:
    def digests(self, dataloader: Any, rank: int, start: int = 0) -> list[int]:
        shared = reader(dataloader, rank=rank, world_size=2)
        return [shared.batch_digest for _ in shared.batches(1, start)]

    @pytest.mark.parametrize("workers", [{}, {"num_workers": 2, "multiprocessing_context": "fork"}])
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_ranks_with_the_same_order_have_the_same_ones(self, workers: dict[str, Any]) -> None:
        torch.manual_seed(0)
        one, other = (self.digests(DataLoader(range(64), 8, shuffle=True, **workers), rank) for rank in range(2))
        assert one == other
        assert len(set(one)) == 8
        assert self.digests(DataLoader(range(64), 8, shuffle=True), 1, start=3) == one[3:]

    def test_an_unseeded_sampler_is_refused_at_the_first_batch(self) -> None:
        one, other = (self.digests(DataLoader(range(64), 8, sampler=Unseeded()), rank) for rank in range(2))
        assert one[0] != other[0]

    @pytest.mark.parametrize("index", [3, 2**70, "key", ("a", 1), torch.tensor(3), b"key"], ids=repr)
    def test_any_index_has_one(self, index: Any) -> None:
        assert 0 <= digest([index, 0]) < 2**32

    def test_other_indices_or_another_order_change_the_fingerprint(self) -> None:
        digests = [digest(indices) for indices in ([1, 2], [2, 1], [1], [1, 2, 3], ["a", "b"], ["b", "a"])]
        assert all(one != other for one, other in pairwise(sorted(digests)))

    def test_addresses_do_not_count(self) -> None:
        assert digest([object()]) == digest([object()])


@given(st.lists(st.integers(1, 5), max_size=12), st.integers(1, 6))
def test_small_batches_are_merged_in_order(sizes: list[int], least: int) -> None:
    numbers = iter(range(sum(sizes)))
    plan = [[next(numbers) for _ in range(size)] for size in sizes]
    merged = list(merge_small(iter([list(batch) for batch in plan]), least))
    assert [number for batch in merged for number in batch] == list(range(sum(sizes)))
    assert all(len(batch) >= least for batch in merged) or (len(merged) == 1 and sum(sizes) < least)
    if all(size >= least for size in sizes):
        assert merged == plan
