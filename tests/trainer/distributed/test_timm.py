"""A timm network on two ranks."""

from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import etude.functional as cf
from etude.algorithms import StochasticDepth
from etude.models import ComposerClassifier
from helpers.networks import images
from helpers.parallel_training import (
    CompareBytes,
    assert_same_on_all_ranks,
    counted_bytes,
    largest_difference,
    sgd,
    train,
)
from helpers.ranks import on_ranks


def make_vit() -> nn.Module:
    import timm

    torch.manual_seed(5)
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        depth=6,
        embed_dim=12,
        num_heads=2,
        num_classes=3,
        drop_path_rate=0.3,
    )
    return ComposerClassifier(vit, 3)


@on_ranks(2)
@pytest.mark.parametrize("drop_unit", ["block", "branch"])
def test_a_vit_trains_as_with_ddp(drop_unit: Literal["block", "branch"]) -> None:
    data = images(num_samples=24, batch_size=4)
    model, reference = make_vit(), make_vit()
    algorithm = StochasticDepth(drop_rate=0.6, drop_unit=drop_unit)
    train(model, data, "12ba", algorithm)
    assert 0.05 < sum(algorithm.realized_drop_rates) / len(algorithm.realized_drop_rates) < 0.95
    cf.apply_stochastic_depth(reference, drop_rate=0.6, drop_unit=drop_unit)
    parallel, optimizer = DistributedDataParallel(reference, find_unused_parameters=True), sgd(reference)
    for _ in range(2):
        for X, y in data:
            mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
            optimizer.zero_grad()
            reference.loss(parallel([X[mine], y[mine]]), [X[mine], y[mine]]).backward()
            optimizer.step()
    assert largest_difference(model, reference) == 0.0
    assert_same_on_all_ranks(model)


@on_ranks(2)
def test_dropped_blocks_of_a_vit_send_nothing() -> None:
    depth = StochasticDepth()  # with the rates of the network's own drop paths
    with counted_bytes() as sizes:
        compare = CompareBytes(depth, sizes)
        train(make_vit(), images(num_samples=16, batch_size=4), "16ba", depth, compare)
    assert len(compare.seen) == 16
    assert len({dropped for dropped, _ in compare.seen}) > 2
    assert all(sends <= 2 * 6 + 1 for _, sends in compare.seen), "one for each branch and one for the rest"


@on_ranks(2)
def test_dropped_branches_of_a_vit_send_nothing() -> None:
    """Of the branches that run, and of the rest, every byte is sent once."""
    model = make_vit()
    depth = StochasticDepth(drop_rate=0.7, drop_distribution="uniform", drop_unit="branch")
    with counted_bytes() as sizes:
        train(model, images(num_samples=4, batch_size=4), "1ba", depth)
    blocks = cf.stochastic_blocks(model)
    dropped = iter(depth.plan.dropped_blocks)
    expected = sum(parameter.nbytes for parameter in model.parameters())
    for block in blocks:
        for branch in block.block_type.branches_of(block):
            if next(dropped):
                expected -= sum(p.nbytes for layer in branch.layers(block) for p in layer.parameters())
    assert 0 < sum(depth.plan.dropped_blocks) < 12
    assert sum(sizes) == expected
