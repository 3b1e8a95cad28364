"""EpochReader: order, resuming, workers, ranks."""

import logging
import multiprocessing
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
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
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from etude.trainer.data.reader import EpochReader
from etude.trainer.reproducibility import generators_kept, seed_all, seed_generators

WORKERS = {"num_workers": 2, "multiprocessing_context": "fork"}
starts_workers = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


class Numbers(Dataset[Tensor]):
    """The numbers from 0, and which of them were asked for."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.asked: list[Any] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        self.asked.append(index)
        return torch.tensor(index)


class Augmented(Numbers):
    """Every sample comes with a draw from each global generator."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index), draw()


class Stream(IterableDataset):
    """Random numbers, a part of them from each worker."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from (draw() for _ in range(6))


class Batches:
    """Random batches from an iterable of one's own."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from (torch.stack([draw(), draw()]) for _ in range(5))


class PythonSampler(Sampler[int]):
    """An order from python's generator."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(10), 10))


class Uneven(Sampler[list[int]]):
    """Batches of given sizes, without any other attribute."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        numbers = iter(range(sum(self.sizes)))
        yield from ([next(numbers) for _ in range(size)] for size in self.sizes)


def draw() -> Tensor:
    numpy = np.random.rand(), np.random.randn()  # noqa: NPY002
    return torch.tensor([torch.rand(()).item(), *numpy, random.random()])


def random_collate(samples: list[Any]) -> Any:
    return default_collate(samples), draw().expand(len(samples), -1)


def reader(dataloader: Any, **settings: Any) -> EpochReader:
    return EpochReader(dataloader, **{"name": "train_dataloader", "seed": 7, "for_training": True} | settings)


def read(dataloader: Any, epoch: int = 0, start: int = 0, **settings: Any) -> list[Any]:
    """The batches without their numbers of rows."""
    return [batch for batch, _ in reader(dataloader, **settings).batches(epoch, start)]


def same(one: Any, other: Any) -> bool:
    """Whether two nests are equal to the last bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(map(same, one, other))


def global_states() -> list[Any]:
    numpy = [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]  # noqa: NPY002
    return [random.getstate(), numpy, torch.get_rng_state().tolist()]


def augmented(**settings: Any) -> DataLoader[Any]:
    return DataLoader(Augmented(11), 3, shuffle=True, collate_fn=random_collate, **settings)


def ordered_by(sampler: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(10), 3, sampler=sampler)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


SOURCES = {
    "shuffled tensors": lambda: DataLoader(TensorDataset(torch.arange(10)), 3, shuffle=True),
    "shuffled subset": lambda: DataLoader(Subset(TensorDataset(torch.arange(20)), range(5, 16)), 3, shuffle=True),
    "augmented": augmented,
    "mixed tensors": lambda: DataLoader(TensorDataset(torch.arange(9)), 2, collate_fn=random_collate),
    "weighted": lambda: ordered_by(WeightedRandomSampler(torch.arange(1.0, 11), 10)),
    "part": lambda: ordered_by(SubsetRandomSampler(range(2, 9))),
    "python's generator": lambda: ordered_by(PythonSampler()),
    "generator of its own": lambda: DataLoader(Numbers(10), 3, shuffle=True, generator=seeded()),
    "batch sampler": lambda: DataLoader(Augmented(9), batch_sampler=BatchSampler(RandomSampler(range(9)), 2, True)),
    "iterable": Batches,
    "stream": lambda: DataLoader(Stream(), 2),
    "unbatched": lambda: DataLoader([torch.full((2,), n) for n in range(6)], batch_size=None, shuffle=True),
    "unbatched, generator of its own": lambda: DataLoader(
        [torch.full((2,), n) for n in range(6)], batch_size=None, shuffle=True, generator=seeded()
    ),
    "list": lambda: [torch.full((2,), n) for n in range(5)],
}
sources = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())


@sources
def test_every_start_gives_the_tail_of_the_whole_epoch(source: Any) -> None:
    whole = read(source(), epoch=1)
    assert len(whole) > 2
    for start in range(len(whole) + 1):
        seed_all(start, deterministic_mode=False)
        assert same(read(source(), epoch=1, start=start), whole[start:])


@sources
def test_an_epoch_may_be_read_again_and_after_others(source: Any) -> None:
    one = reader(source())
    first, second = ([batch for batch, _ in one.batches(epoch)] for epoch in (0, 1))
    assert same([batch for batch, _ in one.batches(0)], first)
    assert same(read(source(), epoch=1), second)


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "list"])
def test_epochs_and_seeds_differ(name: str) -> None:
    source = SOURCES[name]
    whole = read(source())
    assert not same(read(source(), epoch=1), whole)
    assert not same(read(source(), seed=8), whole)


@sources
@pytest.mark.parametrize("normals", [0, 1])
def test_the_global_generators_stay_as_they_were(source: Any, normals: int) -> None:
    seed_all(0, deterministic_mode=False)
    np.random.randn(normals)  # noqa: NPY002  # numpy draws two at once and keeps one
    before = global_states()
    iterator = reader(source()).batches(0)
    assert next(iterator)
    assert global_states() == before
    assert list(iterator)
    assert global_states() == before


def test_the_global_generators_stay_as_they_were_after_an_error() -> None:
    before = global_states()
    broken = DataLoader(Augmented(4), 2, collate_fn=lambda samples: draw() / None)
    with pytest.raises(TypeError):
        read(broken)
    assert global_states() == before


def test_torch_and_numpy_do_not_draw_the_same_numbers() -> None:
    def bits_of_both() -> tuple[int, int]:
        return int(2**24 * torch.rand(())), int.from_bytes(np.random.bytes(4), "little") % 2**24  # noqa: NPY002

    with generators_kept():
        seed_all(5, deterministic_mode=False)
        one, other = bits_of_both()
        assert one == other  # as they do after one seed
        seed_generators(5)
        one, other = bits_of_both()
        assert one != other


def test_readers_do_not_affect_each_other() -> None:
    class Reading:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __iter__(self) -> Iterator[Tensor]:
            for _ in range(3):
                read(self.inner)
                yield draw()

    before = global_states()
    assert same(read(Reading(Batches())), read(Reading([])))
    assert global_states() == before


def test_a_sample_drawn_twice_is_augmented_in_two_ways() -> None:
    ((numbers, augmentations),) = read(DataLoader(Augmented(2), 4, sampler=[0, 1, 0, 1]))
    assert numbers.tolist() == [0, 1, 0, 1]
    assert len(augmentations.unique(dim=0)) == 4


def test_no_sample_before_the_start_is_loaded() -> None:
    dataloader = DataLoader(Numbers(10), 3, shuffle=True)
    batches = read(dataloader, start=2)
    assert len(batches) == 2
    assert cast(Any, dataloader.dataset).asked == torch.cat(batches).tolist()


@pytest.mark.parametrize("name", ["shuffled tensors", "augmented", "list", "iterable"])
def test_an_epoch_must_be_as_long_as_what_was_finished(name: str) -> None:
    length = len(read(SOURCES[name]()))
    with pytest.raises(ValueError, match=rf"train_dataloader must have the {length + 1} batches .* it has {length}"):
        read(SOURCES[name](), start=length + 1)


def test_a_generator_of_the_users_counts_by_its_first_seed_and_is_put_back() -> None:
    def order(initial_seed: int, draws: int) -> list[Any]:
        own = torch.Generator().manual_seed(initial_seed)
        torch.rand(draws, generator=own)
        before = own.get_state()
        found = read(DataLoader(Numbers(10), 10, sampler=RandomSampler(range(10), generator=own)))
        assert torch.equal(own.get_state(), before)
        assert own.initial_seed() == initial_seed
        return found

    assert same(order(1, 0), order(1, 5))
    assert not same(order(1, 0), order(2, 0))


def test_set_epoch_of_a_sampler_is_called() -> None:
    def order(epoch: int) -> list[Any]:
        sampler: DistributedSampler[int] = DistributedSampler(range(10), num_replicas=1, rank=0, seed=3)
        found = read(ordered_by(sampler), epoch)
        assert sampler.epoch == epoch
        return found

    assert not same(order(0), order(1))


@pytest.mark.parametrize("name", ["shuffled tensors", "augmented", "iterable", "list"])
def test_the_rows_of_every_batch_are_counted(name: str) -> None:
    sizes = [rows for _, rows in reader(SOURCES[name]()).batches(0)]
    assert sizes == {"shuffled tensors": [3, 3, 3, 1], "augmented": [3, 3, 3, 2]}.get(name, [2] * 5)


def test_batches_have_the_form_that_the_dataloader_gives_them() -> None:
    samples = [{"inputs": torch.full((2,), float(n)), "target": (n, [n])} for n in range(4)]
    dataloader: DataLoader[Any] = DataLoader(samples, 2)
    assert same(read(dataloader), list(dataloader))
    assert type(read(dataloader)[0]) is dict
    tensors = DataLoader(TensorDataset(torch.arange(4), torch.rand(4, 2)), 2)
    assert same(read(tensors), list(tensors))
    assert type(read(tensors)[0]) is type(next(iter(tensors)))


@pytest.mark.parametrize("num_workers", [0, 2])
@starts_workers
def test_tensors_that_are_replaced_between_epochs_are_read(num_workers: int) -> None:
    dataset = TensorDataset(torch.arange(8))
    workers = WORKERS if num_workers else {}
    for data in (dataset, Subset(dataset, [5, 0, 3])):
        reads = reader(DataLoader(data, 2, **workers))  # type: ignore[arg-type]
        before = [batch for batch, _ in reads.batches(0)]
        dataset.tensors = (dataset.tensors[0] + 10,)
        after = [batch for batch, _ in reads.batches(1)]
        assert before
        assert same(after, [[part + 10 for part in batch] for batch in before])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("length", [12, 15, 17])
def test_parts_of_the_ranks_put_together_are_the_batch_of_one_rank(world_size: int, length: int) -> None:
    def dataloader() -> DataLoader[Any]:
        return DataLoader(Augmented(length), 6, shuffle=True)

    whole = list(reader(dataloader()).batches(2))
    ranks = [list(reader(dataloader(), rank=r, world_size=world_size).batches(2)) for r in range(world_size)]
    assert len(whole) > 1
    for (batch, rows), *parts in zip(whole, *ranks, strict=True):
        assert [part_rows for _, part_rows in parts] == [rows] * world_size
        assert same([torch.cat(column) for column in zip(*(part for part, _ in parts), strict=True)], batch)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_an_evaluation_neither_loses_nor_doubles_a_sample(world_size: int, batch_size: int) -> None:
    for length in range(world_size, 18):
        dataloader = DataLoader(TensorDataset(torch.arange(length)), batch_size)
        settings = {"name": "eval_dataloader", "for_training": False, "world_size": world_size}
        ranks = [list(reader(dataloader, rank=rank, **settings).batches(0)) for rank in range(world_size)]
        rows = [[rows for _, rows in rank] for rank in ranks]
        assert all(sizes == rows[0] for sizes in rows)
        assert sum(rows[0]) == length
        read_numbers = [number for rank in ranks for (numbers,), _ in rank for number in numbers.tolist()]
        assert sorted(read_numbers) == list(range(length))


def test_an_evaluation_joins_the_last_rows_to_the_batch_before() -> None:
    settings = {"name": "eval_dataloader", "for_training": False, "world_size": 3}
    dataloader = DataLoader(Numbers(10), 4)
    assert [rows for _, rows in reader(dataloader, **settings).batches(0)] == [4, 6]
    assert [rows for _, rows in reader(dataloader, **settings).batches(0, 1)] == [6]


def one_row_less(samples: list[Any]) -> Any:
    return default_collate(samples[1:])


def shared(dataset: Any, batch_size: int = 4, **settings: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size, **settings)


@pytest.mark.parametrize(
    ("dataloader", "message"),
    [
        (shared(range(10), 5), "must have a batch_size that world_size=2 divides, got 5"),
        (shared(range(1)), "must have at least one sample for each of world_size=2 ranks, got 1"),
        (shared(range(9)), "got 1 left of 9 samples in batches of 4; use drop_last=True or another batch_size"),
        (shared(range(8), sampler=DistributedSampler(range(8), 2, 0)), "must have no DistributedSampler"),
        (
            DataLoader(range(8), batch_sampler=BatchSampler(DistributedSampler(range(8), 2, 0), 2, False)),
            "must have no DistributedSampler",
        ),
        (shared(Stream(), 2), "must be a torch DataLoader over a map-style dataset"),
        (shared(range(8), None), "must be a torch DataLoader over a map-style dataset"),
        ([torch.ones(2)], "must be a torch DataLoader over a map-style dataset.* got a list"),
    ],
)
def test_data_that_cannot_be_split_over_ranks_is_refused(dataloader: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^train_dataloader .*{message}"):
        reader(dataloader, world_size=2)
    reader(dataloader)


def test_a_remedy_that_an_error_names_is_one() -> None:
    assert read(shared(range(9), drop_last=True), world_size=2)


def test_batches_of_unknown_sizes_are_refused_when_they_are_listed() -> None:
    dataloader: DataLoader[int] = DataLoader(range(6), batch_sampler=Uneven(3, 1, 2))
    with pytest.raises(ValueError, match="at least world_size=2 rows, batch 1 of epoch 4 has 1"):
        read(dataloader, epoch=4, world_size=2)
    settings = {"name": "eval_dataloader", "for_training": False, "world_size": 2}
    assert [rows for _, rows in reader(dataloader, **settings).batches(0)] == [3, 3]


def test_an_evaluation_of_fewer_samples_than_ranks_is_refused() -> None:
    settings = {"name": "eval_dataloader", "for_training": False, "world_size": 3}
    with pytest.raises(ValueError, match=r"eval_dataloader must have at least one sample .*world_size=3 ranks, got 2"):
        reader(DataLoader(range(2)), **settings)
    with pytest.raises(ValueError, match="eval_dataloader must have batches of at least world_size=3 rows"):
        read(DataLoader(range(3), batch_sampler=Uneven(2)), **settings)


def test_a_collate_fn_that_loses_rows_is_refused_on_several_ranks() -> None:
    dataloader = DataLoader(Numbers(8), 4, collate_fn=one_row_less)
    assert [rows for _, rows in reader(dataloader).batches(0)] == [3, 3]
    with pytest.raises(ValueError, match=r"train_dataloader must have a collate_fn .* got 1 rows of 2 samples"):
        read(dataloader, world_size=2)


def test_batches_in_any_order_are_refused() -> None:
    with pytest.raises(ValueError, match="train_dataloader must have in_order=True"):
        reader(DataLoader(range(4), in_order=False, **WORKERS))


@pytest.mark.parametrize("name", ["iterable", "stream", "unbatched"])
def test_reading_again_from_the_beginning_logs_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read(SOURCES[name]())
        assert not caplog.records
        assert read(SOURCES[name](), start=2)
    (record,) = caplog.records
    assert "train_dataloader is read again from the beginning of epoch 0" in record.getMessage()


@pytest.mark.parametrize("name", ["shuffled tensors", "augmented", "list"])
def test_a_monitor_that_starts_in_the_middle_does_not_warn(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert read(SOURCES[name](), start=2)
    assert not caplog.records


def test_a_dataloader_with_an_iterator_of_its_own_is_read_through_it() -> None:
    class Twice(DataLoader[Any]):
        def __iter__(self) -> Any:
            yield from (2 * batch for batch in super().__iter__())

    assert torch.cat(read(Twice(Numbers(4), 2))).tolist() == [0, 2, 4, 6]


@starts_workers
def test_workers_change_nothing_and_end_with_the_reading() -> None:
    whole = read(augmented())
    before = global_states()
    assert same(read(augmented(**WORKERS)), whole)
    iterator = reader(augmented(**WORKERS)).batches(0, start=1)
    assert same(next(iterator)[0], whole[1])
    assert multiprocessing.active_children()
    iterator.close()
    assert not multiprocessing.active_children()
    assert global_states() == before


@starts_workers
def test_persistent_workers_change_nothing() -> None:
    several = reader(augmented(**WORKERS, persistent_workers=True))
    next(several.batches(0))  # and stop early
    workers = {worker.pid for worker in multiprocessing.active_children()}
    assert len(workers) == 2
    for epoch, start in ((0, 0), (1, 0), (1, 2), (0, 4), (2, 3)):
        found = [batch for batch, _ in several.batches(epoch, start)]
        assert same(found, read(augmented(), epoch, start))
    assert {worker.pid for worker in multiprocessing.active_children()} == workers
    del several
    assert not multiprocessing.active_children()


@starts_workers
@pytest.mark.parametrize("persistent", [False, True])
def test_a_stream_is_repeated_by_its_workers(persistent: bool) -> None:
    def dataloader() -> DataLoader[Any]:
        return DataLoader(Stream(), 2, **WORKERS, persistent_workers=persistent)

    before = global_states()
    stream = reader(dataloader())
    first, second = ([batch for batch, _ in stream.batches(epoch)] for epoch in (0, 1))
    assert len(torch.cat(first).unique(dim=0)) == 12  # both workers, of six different samples each
    assert not same(first, second)
    assert same(read(dataloader(), epoch=1, start=2), second[2:])
    assert global_states() == before
    assert not multiprocessing.active_children()


class Broken(Stream):
    """Fails while a worker reads it."""

    def __iter__(self) -> Iterator[Tensor]:
        yield draw()
        raise ArithmeticError("as it should")


@starts_workers
@pytest.mark.parametrize(
    "broken",
    [
        DataLoader(Augmented(4), 2, collate_fn=lambda samples: draw() / None, **WORKERS),
        DataLoader(Broken(), 1, **WORKERS),
    ],
)
def test_workers_end_after_an_error_whose_traceback_references_them(broken: Any) -> None:
    with pytest.raises((TypeError, ArithmeticError)) as info:
        read(broken)
    assert not multiprocessing.active_children()
    assert info.tb


class Confession(Numbers):
    """Tells what a worker ignores, and what its own worker_init_fn has found."""

    found = None

    def __getitem__(self, index: int) -> Tensor:
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        return torch.tensor([handler is signal.SIG_IGN for handler in handlers] + [self.found is True])


def find_the_dataset(worker_id: int) -> None:
    get_worker_info().dataset.found = type(get_worker_info().dataset) is Confession


@starts_workers
def test_workers_ignore_the_signals_that_end_a_run_and_run_the_users_worker_init_fn() -> None:
    (told,) = read(DataLoader(Confession(2), 2, worker_init_fn=find_the_dataset, **WORKERS))
    assert told.tolist() == [[True] * 3] * 2


@starts_workers
def test_workers_of_a_stream_ignore_the_signals_that_end_a_run() -> None:
    class Handlers(IterableDataset):
        def __iter__(self) -> Iterator[bool]:
            return iter([signal.getsignal(signal.SIGTERM) is signal.SIG_IGN])

    told = torch.cat(read(DataLoader(Handlers(), 1, **WORKERS)))
    assert told.tolist() == [True, True]


@pytest.mark.slow
def test_python_ends_while_spawned_workers_wait() -> None:
    code = """if True:
        import torch
        from torch.utils.data import DataLoader, StackDataset
        from etude.trainer.data.reader import EpochReader
        dataloader = DataLoader(
            StackDataset(torch.arange(8)), 2, num_workers=1, persistent_workers=True, multiprocessing_context="spawn"
        )
        iterator = EpochReader(dataloader, name="train_dataloader", seed=0, for_training=True).batches(0)
        print(next(iterator)[0][0].tolist())
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[0, 1]"
    assert done.stderr == ""
