"""Bytes sent between two ranks: dropped blocks send nothing."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import etude.functional as cf
from etude.algorithms import StochasticDepth
from helpers.networks import images, vectors
from helpers.parallel_training import (
    CompareBytes,
    assert_same_on_all_ranks,
    counted_bytes,
    make_model,
    parameters,
    refused,
    train,
)
from helpers.ranks import on_ranks
from helpers.resumable import differences


@on_ranks(2)
@pytest.mark.parametrize("microbatch_size", [None, 1])
def test_dropped_blocks_send_nothing_and_others_once_per_step(microbatch_size: int | None) -> None:
    depth = StochasticDepth(drop_rate=0.7)
    with counted_bytes() as sizes:
        compare = CompareBytes(depth, sizes)
        data = images(num_samples=16, batch_size=4)
        train(make_model(), data, "20ba", depth, compare, device_train_microbatch_size=microbatch_size)
    assert len(compare.seen) == 20
    assert len({dropped for dropped, _ in compare.seen}) > 2
    assert all(sends <= 6 + 1 for _, sends in compare.seen), "one for each block and one for the rest"


class Branching(nn.Module):
    """A model that uses another branch on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
        self.register_buffer("small", torch.full((3,), dist.get_rank(), dtype=torch.int16))

    def forward(self, batch: Any) -> Tensor:
        return self.branches[dist.get_rank()](batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


@on_ranks(2)
def test_branches_of_a_models_own_are_found_or_allowed() -> None:
    torch.manual_seed(0)
    model = Branching()
    before = parameters(model)
    with refused("all ranks must use the same parameters in a step"):
        train(model, vectors(), "4ba")
    assert differences(before, parameters(model)) == []
    train(model, vectors(), "4ba", find_unused_parameters=True)
    assert_same_on_all_ranks(model)
    assert model.small.tolist() == [0, 0, 0], "buffers of any kind are those of rank 0"
    for branch in ("branches.0.weight", "branches.1.weight"):
        assert not torch.equal(before[branch], parameters(model)[branch])


@on_ranks(2)
def test_plans_that_differ_are_found_in_debug_mode() -> None:
    dist.set_debug_level(dist.DebugLevel.INFO)
    model = cf.apply_stochastic_depth(make_model(), drop_rate=0.5, seed=dist.get_rank())
    try:
        with refused("all ranks must drop the same blocks, but at step 0"):
            model(next(iter(images())))
        train(make_model(), images(), "2ba", StochasticDepth(drop_rate=0.5))
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


@on_ranks(2)
def test_a_loop_with_the_wrong_ddp_is_refused() -> None:
    model = cf.apply_stochastic_depth(make_model(), drop_rate=0.5)
    batch = next(iter(images()))
    with refused("must have find_unused_parameters=True"):
        DistributedDataParallel(model)(batch)
    static = DistributedDataParallel(model, find_unused_parameters=True, static_graph=True)
    with refused("must have static_graph=False"):
        static(batch)
    with refused("must have find_unused_parameters=True"):
        cf.apply_stochastic_depth(DistributedDataParallel(make_model()))
