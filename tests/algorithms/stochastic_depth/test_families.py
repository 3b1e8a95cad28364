"""Every hand-written block type of torchvision and timm, against the block's own forward."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etude.functional as cf
from etude.algorithms.stochastic_depth.blocks import block_type_of
from etude.algorithms.stochastic_depth.blocks.drop_path import find_drop_paths
from etude.algorithms.stochastic_depth.blocks.registry import BLOCK_TYPES
from etude.algorithms.stochastic_depth.blocks.tracing import SplitError, trace_branches
from etude.algorithms.stochastic_depth.torch_internals import swin_attention
from helpers.residual_families import FAMILIES, build
from helpers.residual_networks import NETWORKS
from helpers.residual_networks import build as build_small


def calls_of(network: nn.Module, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Each known block of a network with the input it gets."""
    calls: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, args: calls.append((module, args[0].detach().clone())))
        for block in network.modules()
        if block_type_of(type(block)) is not None
    ]
    network(x)
    for hook in hooks:
        hook.remove()
    return calls


def outcome(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients."""
    x = x.clone().requires_grad_()
    out = network(x)
    used = (x, *network.parameters())
    gradients = torch.autograd.grad(out.square().sum(), used, allow_unused=True)
    return [out, *(torch.zeros_like(p) if g is None else g for p, g in zip(used, gradients, strict=True))]


def test_the_attention_of_swin_blocks_has_its_private_name() -> None:
    """`timm.models.swin_transformer.SwinTransformerBlock._attn`, and that of V2."""
    for name in ("timm Swin", "timm Swin V2"):
        block = next(one for one in build(name)[0].modules() if type(one).__name__.endswith("Block"))
        assert swin_attention(block, torch.randn(2, 8, 8, 16, dtype=torch.float64)).shape == (2, 8, 8, 16)


def test_every_known_type_is_tested() -> None:
    networks = [build(name)[0] for name in FAMILIES] + [build_small(name)[0] for name in NETWORKS]
    found = [block_type_of(type(module)) for network in networks for module in network.modules()]
    names = {block_type.name for block_type in found if block_type is not None}
    assert names == {block_type.name for block_type in BLOCK_TYPES.values()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_branches_are_all_that_a_block_computes(name: str) -> None:
    network, x = build(name)
    calls = calls_of(network.eval(), x)
    assert calls
    for block, block_input in calls:
        block_type: Any = block_type_of(type(block))
        if not block_type.is_residual(block):
            continue
        plain, out = block(block_input.clone()), block_input
        for branch in block_type.branches_of(block):
            out = branch.run(block, out, 1.0)
        assert torch.allclose(out, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tracer_finds_the_branches_that_are_written_by_hand(name: str) -> None:
    network, x = build(name)
    for block, block_input in calls_of(network.eval(), x):
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
@pytest.mark.parametrize("name", FAMILIES)
def test_at_rate_zero_outputs_and_gradients_are_those_of_the_plain_network(name: str, method: str) -> None:
    network, x = build(name)
    plain = copy.deepcopy(network)
    for module in plain.modules():
        for path in find_drop_paths(module):
            drop_path: Any = module.get_submodule(path)
            setattr(drop_path, "p" if hasattr(drop_path, "p") else "drop_prob", 0.0)
    keys = list(network.state_dict())
    cf.apply_stochastic_depth(network, stochastic_method=method, drop_rate=0.0)  # type: ignore[arg-type]
    assert list(network.state_dict()) == keys
    torch.manual_seed(1)
    expected = outcome(plain, x)
    torch.manual_seed(1)
    for ours, theirs in zip(outcome(network, x), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["block", "sample"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_network_trains_folds_and_can_be_restored(name: str, method: str) -> None:
    network, x = build(name)
    plain = copy.deepcopy(network)
    cf.apply_stochastic_depth(network, stochastic_method=method, drop_rate=0.5)  # type: ignore[arg-type]
    assert not any(find_drop_paths(block) for block in cf.stochastic_blocks(network))
    for _ in range(3):
        assert all(value.isfinite().all() for value in outcome(network, x))
    restored = cf.remove_stochastic_depth(copy.deepcopy(network))
    assert repr(restored) == repr(plain)
    before = network.eval()(x)
    cf.fold_stochastic_depth(network)
    assert torch.allclose(network(x), before, rtol=1e-8, atol=1e-8)
