"""Hand-written block types of torchvision and timm against the original forward."""

from typing import Any

import pytest
import torch
from torch import nn

from etude.algorithms.stochastic_depth.blocks import block_type_of
from etude.algorithms.stochastic_depth.blocks.drop_path import find_drop_paths
from etude.algorithms.stochastic_depth.blocks.registry import BLOCK_TYPES
from etude.algorithms.stochastic_depth.blocks.tracing import SplitError, trace_branches
from etude.algorithms.stochastic_depth.torch_internals import swin_attention, swin_v2_cr_attention
from helpers.conversion import (
    Method,
    calls_of,
    check_own_masks_taken_over,
    check_rate_zero,
    check_training_folding_and_removal,
)
from helpers.residual_families import CANNOT_FOLD, FAMILIES, build
from helpers.residual_networks import NETWORKS
from helpers.residual_networks import build as build_small


def is_known(module: nn.Module) -> bool:
    return block_type_of(type(module)) is not None


def test_the_attention_of_swin_blocks_has_its_private_name() -> None:
    """`timm.models.swin_transformer.SwinTransformerBlock._attn`, and that of V2."""
    for name in ("timm Swin", "timm Swin V2"):
        block = next(one for one in build(name)[0].modules() if type(one).__name__.endswith("Block"))
        assert swin_attention(block, torch.randn(2, 8, 8, 16, dtype=torch.float64)).shape == (2, 8, 8, 16)
    block = next(one for one in build("timm Swin V2 Cr")[0].modules() if type(one).__name__.endswith("Block"))
    assert swin_v2_cr_attention(block, torch.randn(2, 8, 8, 16, dtype=torch.float64)).shape == (2, 8, 8, 16)


NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "timm SENet" else name for name in FAMILIES]


def test_every_known_type_is_tested() -> None:
    """Those of transformers are tested in test_hugging_face; other tests register blocks of their own."""
    libraries = ("etude", "timm", "torch", "torchvision")
    networks = [build(name)[0] for name in FAMILIES] + [build_small(name)[0] for name in NETWORKS]
    found = [block_type_of(type(module)) for network in networks for module in network.modules()]
    names = {block_type.name for block_type in found if block_type is not None}
    assert names == {known.name for path, known in BLOCK_TYPES.items() if path.split(".")[0] in libraries}


@pytest.mark.parametrize("name", NAMES)
def test_the_branches_are_all_that_a_block_computes(name: str) -> None:
    network, x = build(name)
    calls = calls_of(network.eval(), x, is_known)
    assert calls
    for call in calls:
        block, block_input = call.block, call.x
        block_type: Any = block_type_of(type(block))
        if not block_type.is_residual(block):
            continue
        plain, out = block(block_input.clone()), block_input
        for branch in block_type.branches_of(block):
            out = branch.run(block, out, 1.0)
        assert torch.allclose(out, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_tracer_finds_the_branches_that_are_written_by_hand(name: str) -> None:
    network, x = build(name)
    for call in calls_of(network.eval(), x, is_known):
        block, block_input = call.block, call.x
        block_type: Any = block_type_of(type(block))
        try:
            traced = trace_branches(block, type(block), {})
        except SplitError as error:
            assert "values from before the branch" in str(error) or "cannot be traced" in str(error)
            continue
        if not block_type.is_residual(block):
            assert not traced
            continue
        branches = block_type.branches_of(block)
        if not traced and any(branch.is_projection(block) for branch in branches):
            continue  # nothing marks which of the two sides is the shortcut
        assert len(traced) == len(branches)
        out = block_input
        for ours, theirs in zip(branches, traced, strict=True):
            assert torch.allclose(ours.drop(block, out), theirs.drop(block, out), atol=1e-12)
            out = ours.run(block, out, 1.0)


@pytest.mark.parametrize("method", ["block", "sample"])
@pytest.mark.parametrize("name", NAMES)
def test_at_rate_zero_outputs_and_gradients_are_those_of_the_plain_network(name: str, method: Method) -> None:
    check_rate_zero(*build(name), method)


@pytest.mark.parametrize("method", ["block", "sample"])
@pytest.mark.parametrize("name", NAMES)
def test_every_network_trains_folds_and_can_be_restored(name: str, method: Method) -> None:
    check_training_folding_and_removal(*build(name), method, folds=name not in CANNOT_FOLD)


@pytest.mark.parametrize("name", [name for name in FAMILIES if find_drop_paths(FAMILIES[name]())])
def test_own_masks_are_taken_over_and_no_row_is_dropped_twice(name: str) -> None:
    check_own_masks_taken_over(*build(name))
