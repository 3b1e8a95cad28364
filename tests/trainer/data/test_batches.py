"""Splitting, moving and concatenating batches."""

import types
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from etude.engine import Algorithm, Engine, Event, Logger, State
from etude.trainer.data.batches import move, num_samples, read_batches, split
from etude.trainer.data.reader import EpochReader
from helpers.networks import LinearModel

Pair = namedtuple("Pair", ["inputs", "targets"])
INPUTS, TARGETS = torch.arange(20.0).reshape(10, 2), torch.arange(10)
NAMES = [f"name {number}" for number in range(10)]


class Encoding(UserDict[str, Any]):
    """A mapping that is no dict, as the collators of Hugging Face give."""


class Record(dict[str, Any]):
    """A dict with an attribute, which cannot be built from its items alone."""

    def __init__(self, source: str, **items: Any) -> None:
        super().__init__(items)
        self.source = source


@dataclass(frozen=True)
class Example:
    inputs: Tensor
    targets: Tensor
    names: list[str] = field(default_factory=lambda: list(NAMES), kw_only=True)


@dataclass(slots=True)
class Derived:
    inputs: Tensor
    doubled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.doubled = 2 * self.inputs


class Columns(list[Any]):
    """A list of one's own."""


NESTS: dict[str, Any] = {
    "tensor": INPUTS,
    "tuple": (INPUTS, TARGETS),
    "list": [INPUTS, TARGETS],
    "dict": {"inputs": INPUTS, "targets": TARGETS},
    "namedtuple": Pair(INPUTS, TARGETS),
    "nested": ({"a": INPUTS, "b": [TARGETS, (INPUTS,)]}, TARGETS),
    "OrderedDict": OrderedDict(inputs=INPUTS, targets=TARGETS),
    "defaultdict": defaultdict(list, {"inputs": INPUTS, "targets": TARGETS}),
    "UserDict": Encoding(inputs=INPUTS, targets=TARGETS),
    "dict with an attribute": Record("here", inputs=INPUTS, targets=TARGETS),
    "read-only mapping": types.MappingProxyType({"inputs": INPUTS, "targets": TARGETS}),
    "list of one's own": Columns([INPUTS, TARGETS]),
    "frozen dataclass": Example(INPUTS, TARGETS),
    "dataclass with slots": Derived(INPUTS),
    "strings": {"inputs": INPUTS, "names": NAMES},
    "tuple of strings": (INPUTS, tuple(NAMES)),
    "array": {"inputs": INPUTS, "array": np.arange(10)},
    "columns of strings": {"inputs": INPUTS, "captions": [tuple(NAMES), tuple(NAMES[::-1])]},
    "lists of strings": {"inputs": INPUTS, "words": [[name] * (number % 3) for number, name in enumerate(NAMES)]},
    "namedtuple of strings": {"inputs": INPUTS, "pair": Pair(NAMES, NAMES[::-1])},
    "dicts of strings": {"inputs": INPUTS, "meta": [{"name": name} for name in NAMES]},
}
nests = pytest.mark.parametrize("batch", NESTS.values(), ids=NESTS.keys())


def children(batch: Any) -> list[Any] | None:
    """What a container holds."""
    if isinstance(batch, (tuple, list)):
        return list(batch)
    if isinstance(batch, (dict, UserDict, types.MappingProxyType)):
        return list(batch.values())
    if isinstance(batch, Example):
        return [batch.inputs, batch.targets, batch.names]
    return [batch.inputs, batch.doubled] if isinstance(batch, Derived) else None


def tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    return [tensor for part in children(batch) or () for tensor in tensors(part)]


def row(batch: Any, number: int) -> Any:
    """One row of a batch of ten, read independently: a column has ten elements, all else holds columns."""
    if isinstance(batch, Tensor):
        return batch[number].tolist()
    if isinstance(batch, (list, tuple, np.ndarray)) and len(batch) == 10:
        return batch[number]
    return [row(part, number) for part in children(batch) or ()]


def same_rows(part: Any, batch: Any, numbers: range) -> bool:
    """Whether a microbatch holds these rows, in containers of the same types."""
    if isinstance(batch, Tensor):
        return torch.equal(part, batch[numbers.start : numbers.stop])
    if type(part) is not type(batch):
        return False
    if isinstance(batch, (list, tuple, np.ndarray)) and len(batch) == 10:
        return list(part) == list(batch)[numbers.start : numbers.stop]
    pairs = zip(children(part) or (), children(batch) or (), strict=True)
    return all(same_rows(one, other, numbers) for one, other in pairs)


@nests
def test_the_rows_are_counted(batch: Any) -> None:
    assert num_samples(batch) == 10


@nests
@pytest.mark.parametrize("size", [1, 3, 5, 10, 11])
def test_microbatches_are_the_rows_in_order_in_containers_of_the_same_type(batch: Any, size: int) -> None:
    parts = list(split(batch, size))
    full, rest = divmod(10, size)
    assert [num_samples(part) for part in parts] == [size] * full + [rest] * (rest > 0)
    for number, part in enumerate(parts):
        assert same_rows(part, batch, range(number * size, min(10, (number + 1) * size)))


@nests
def test_moving_keeps_types_and_values(batch: Any) -> None:
    assert same_rows(move(batch, torch.device("cpu")), batch, range(10))


@nests
def test_every_tensor_is_moved_and_the_batch_stays(batch: Any) -> None:
    moved = tensors(move(batch, torch.device("meta")))
    assert moved
    assert {tensor.device.type for tensor in moved} == {"meta"}
    assert {tensor.device.type for tensor in tensors(batch)} == {"cpu"}


def test_containers_keep_what_else_they_have() -> None:
    for part in (next(split(NESTS["defaultdict"], 3)), move(NESTS["defaultdict"], torch.device("cpu"))):
        assert part.default_factory is list
    for part in (next(split(NESTS["dict with an attribute"], 3)), move(NESTS["dict with an attribute"], "cpu")):
        assert part.source == "here"
    assert torch.equal(next(split(Derived(INPUTS), 3)).doubled, 2 * INPUTS[:3])


@given(
    st.recursive(
        st.sampled_from([INPUTS, TARGETS, NAMES, "a text", None, 0.5]),
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.dictionaries(st.text(max_size=2), inner, min_size=1, max_size=3),
            st.builds(OrderedDict, st.dictionaries(st.text(max_size=2), inner, min_size=1, max_size=3)),
            st.tuples(inner, inner),
            st.builds(Pair, inner, inner),
        ),
        max_leaves=8,
    ),
    st.integers(1, 12),
)
def test_any_nest_is_split_by_rows_or_refused(nest: Any, size: int) -> None:
    batch = {"inputs": INPUTS, "nest": nest}
    try:
        parts = list(split(batch, size))
    except ValueError as error:
        assert "batch['nest']" in str(error)  # lists without a row for each, such as ["a text"]
        return
    for number, part in enumerate(parts):
        assert same_rows(part, batch, range(number * size, min(10, (number + 1) * size)))


@pytest.mark.parametrize("value", ["a text", b"bytes", 3, 0.5, None, True, torch.Size([3, 4]), torch.float16], ids=repr)
def test_a_value_for_the_whole_batch_is_in_every_microbatch(value: Any) -> None:
    assert [part["value"] for part in split({"inputs": INPUTS, "value": value}, 4)] == [value] * 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (NAMES[:9], r"batch\['value'\] must have one element for each of the 10 rows .* it has 9"),
        ({"deep": (1, 2)}, r"batch\['value'\]\['deep'\] must have one element for each of the 10 rows"),
        (np.arange(4), r"batch\['value'\] must have one element for each of the 10 rows .* it has shape \(4,\)"),
        (object(), r"batch\['value'\] is a object"),
        ({1, 2}, r"batch\['value'\] is a set"),
        (pack_sequence([torch.ones(2), torch.ones(1)]), r"batch\['value'\] is a PackedSequence"),
        ([NAMES] * 10, r"batch\['value'\] .* with 10 rows it can be read as either"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_cannot_be_split_by_rows_are_refused_with_their_path(value: Any, message: str) -> None:
    batch = {"inputs": INPUTS, "value": value}
    with pytest.raises(ValueError, match=message):
        list(split(batch, 4))
    assert next(split(batch, 10)) is batch
    assert move(batch, torch.device("cpu"))["value"] is not None


def test_other_objects_are_moved_by_their_own_method() -> None:
    class Graph:
        device = "cpu"

        def to(self, device: torch.device) -> "Graph":
            moved = Graph()
            moved.device = device.type
            return moved

    assert move({"inputs": INPUTS, "graph": Graph()}, torch.device("meta"))["graph"].device == "meta"


@pytest.mark.parametrize("batch", ["text", 3, None, (), {}, [1, "a"], UserDict(), np.ones(3)], ids=repr)
def test_a_batch_without_tensors_is_refused(batch: Any) -> None:
    with pytest.raises(ValueError, match=rf"must be \(inputs, targets\), .* got a {type(batch).__name__} without"):
        num_samples(batch)


@pytest.mark.parametrize("other", [torch.zeros(9), torch.zeros(())], ids=["nine rows", "no dimension"])
def test_unequal_rows_are_refused_by_their_places(other: Tensor) -> None:
    message = r"same first dimension, got batch.inputs of shape \(10, 2\), batch.targets\[0\] of shape \("
    with pytest.raises(ValueError, match=message):
        num_samples(Pair(INPUTS, [other]))


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one row, got batch of shape \(0, 3\)"):
        num_samples(torch.zeros(0, 3))


class Repeat(Algorithm):
    """Doubles the rows of every batch."""

    def match(self, event: Event, state: State) -> bool:
        return event is Event.AFTER_DATALOADER

    def apply(self, event: Event, state: State, logger: Any) -> None:
        state.batch = torch.cat([state.batch, state.batch])


class Read(NamedTuple):
    rows: int
    num_local: int
    num_global: int


def read_with(world_size: int) -> Iterator[Read]:
    state = State(model=LinearModel(), algorithms=(Repeat(),), world_size=world_size)
    reader = EpochReader([torch.ones(4, 2), torch.ones(3, 2)], name="train_dataloader", seed=0, for_training=True)
    events: Callable[..., Any] = read_batches
    for batch in events(Engine(state, Logger(state)), reader, Event.BEFORE_DATALOADER, Event.AFTER_DATALOADER):
        yield Read(len(batch), state.batch_num_samples, state.global_batch_num_samples)


def test_rows_are_counted_after_the_algorithms() -> None:
    assert list(read_with(world_size=1)) == [(8, 8, 8), (6, 6, 6)]


def test_another_number_of_rows_is_refused_on_several_ranks() -> None:
    with pytest.raises(ValueError, match=r"AFTER_DATALOADER changed it from 4 to 8 on rank 0 with world_size=2"):
        next(read_with(world_size=2))
