from collections import namedtuple

import pytest
import torch

from etude.trainer.data.batches import move, num_samples, split

Pair = namedtuple("Pair", ["inputs", "targets"])
INPUTS, TARGETS = torch.arange(20.0).reshape(10, 2), torch.arange(10)
NESTS = {
    "tensor": INPUTS,
    "tuple": (INPUTS, TARGETS),
    "list": [INPUTS, TARGETS],
    "dict": {"inputs": INPUTS, "targets": TARGETS},
    "namedtuple": Pair(INPUTS, TARGETS),
    "nested": ({"a": INPUTS, "b": [TARGETS, (INPUTS,)]}, TARGETS),
}
nests = pytest.mark.parametrize("batch", NESTS.values(), ids=NESTS.keys())


def tensors(batch) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    return [tensor for part in (batch.values() if isinstance(batch, dict) else batch) for tensor in tensors(part)]


def structure(batch):
    """The batch with shapes in the places of tensors, without the number of rows."""
    if isinstance(batch, torch.Tensor):
        return tuple(batch.shape[1:])
    parts = batch.items() if isinstance(batch, dict) else enumerate(batch)
    return type(batch), [(key, structure(part)) for key, part in parts]


@nests
def test_the_rows_are_counted(batch):
    assert num_samples(batch) == 10


@nests
@pytest.mark.parametrize("size", [1, 3, 5, 10, 11])
def test_microbatches_are_the_rows_in_order(batch, size):
    parts = list(split(batch, size))
    full, rest = divmod(10, size)
    assert [num_samples(part) for part in parts] == [size] * full + [rest] * (rest > 0)
    assert all(structure(part) == structure(batch) for part in parts)
    for whole, *pieces in zip(tensors(batch), *map(tensors, parts), strict=True):
        assert torch.equal(torch.cat(pieces), whole)


@nests
def test_moving_keeps_structure_and_values(batch):
    moved = move(batch, torch.device("cpu"))
    assert structure(moved) == structure(batch)
    pairs = list(zip(tensors(moved), tensors(batch), strict=True))
    assert pairs
    assert all(torch.equal(there, here) for there, here in pairs)


@nests
def test_every_tensor_is_moved(batch):
    moved = tensors(move(batch, torch.device("meta")))
    assert moved
    assert {tensor.device.type for tensor in moved} == {"meta"}


def test_what_is_no_tensor_stays_as_it_is():
    names = object()
    batch = {"inputs": INPUTS, "names": names}
    assert next(iter(split(batch, 4)))["names"] is names
    assert move(batch, torch.device("cpu"))["names"] is names


@pytest.mark.parametrize("batch", ["text", 3, None, (), {}, [1, "a"]], ids=repr)
def test_a_batch_without_tensors_is_refused(batch):
    with pytest.raises(ValueError, match=rf"must be \(inputs, targets\), .* got a {type(batch).__name__} without any"):
        num_samples(batch)


@pytest.mark.parametrize("other", [torch.zeros(9), torch.zeros(())], ids=["nine rows", "no dimension"])
def test_unequal_rows_are_refused(other):
    with pytest.raises(ValueError, match=r"must have the same first dimension, got \[\d, 10\]"):
        num_samples((INPUTS, other))
