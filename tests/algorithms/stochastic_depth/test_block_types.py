"""Block types of torchvision, etude and torch.nn: conversion, training, evaluation, folding."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, Bottleneck

import etude.functional as cf
from etude.algorithms.stochastic_depth.blocks import block_type_of, registry
from etude.algorithms.stochastic_depth.blocks.registry import BLOCK_TYPES
from helpers.residual_networks import NETWORKS, Encoder, build


def calls_of(network: nn.Module, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Each stochastic block of a network with the input it gets."""
    calls = []
    hooks = [
        block.register_forward_pre_hook(lambda module, args: calls.append((module, args[0].detach().clone())))
        for block in network.modules()
        if block_type_of(type(block)) is not None or hasattr(block, "drop_plan")
    ]
    network(x)
    for hook in hooks:
        hook.remove()
    return calls


def force(network: nn.Module, **decision: Any) -> None:
    plan = cf.stochastic_blocks(network)[0].drop_plan
    plan.draw(0, num_rows=4)
    plan.open()
    if "dropped" in decision:
        plan.decide([decision["dropped"]] * len(plan.rates))
    else:
        plan.decide(np.tile(~np.array(decision["kept"]), (len(plan.rates), 1)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_branches_are_all_that_a_block_computes(name: str, training: bool) -> None:
    network, x = build(name)
    calls = calls_of(network.train(training), x)
    assert len(calls) >= 2
    for block, block_input in calls:
        plain, out = copy.deepcopy(block)(block_input), block_input
        for branch in block_type_of(type(block)).branches:
            out = branch.run(block, out, 1.0)
        assert torch.allclose(out, plain, atol=1e-12)


@pytest.mark.parametrize("drop_unit", ["block", "branch"])
@pytest.mark.parametrize("method", ["block", "sample"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_trains_and_folds(name: str, method: str, drop_unit: str) -> None:
    network, x = build(name)
    if drop_unit == "branch" and not any(word in name for word in ("ViT", "encoder")):
        with pytest.raises(ValueError, match="drop_unit must be 'block' for blocks of a single branch, got 'branch'"):
            cf.apply_stochastic_depth(network, drop_unit=drop_unit)
        return
    plain = copy.deepcopy(network)
    cf.apply_stochastic_depth(network, stochastic_method=method, drop_rate=0.4, drop_unit=drop_unit)
    x.requires_grad_()
    for _ in range(4):
        out = network(x)
        out.square().sum().backward()
        assert out.isfinite().all()
    assert x.grad.isfinite().all()
    before = network.eval()(x)
    assert not torch.allclose(before, plain.eval()(x))
    cf.fold_stochastic_depth(network)
    assert [type(module) for module in network.modules()] == [type(module) for module in plain.modules()]
    assert torch.allclose(network(x), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in NETWORKS if "post" not in name])
def test_a_dropped_block_gives_its_shortcut(name: str) -> None:
    network, x = build(name)
    cf.apply_stochastic_depth(network, drop_rate=0.5)
    force(network, dropped=True)
    network._forward_pre_hooks.clear()
    seen = 0
    for block, block_input in calls_of(network, x):
        force(network, dropped=True)
        if not block.block_type.is_projection(block):
            seen += 1
            block_input = block_input.relu() if isinstance(getattr(block, "relu", None), nn.ReLU) else block_input
            assert torch.equal(block(block_input), block_input)
    assert seen


@pytest.mark.parametrize("name", [name for name in NETWORKS if any(word in name for word in ("ViT", "encoder"))])
def test_rows_of_a_transformer_are_computed_as_in_the_whole_batch(name: str) -> None:
    """Layer norm knows no batch, so every kept row must equal that of the plain network."""
    network, x = build(name)
    plain = copy.deepcopy(network)
    cf.apply_stochastic_depth(network, stochastic_method="sample", drop_rate=0.5)
    kept = torch.tensor([True, False, True, False])
    for block, block_input in calls_of(plain, x):
        force(network, kept=kept.tolist())
        twin = next(b for n, b in network.named_modules() if dict(plain.named_modules())[n] is block)
        dim = twin.block_type.get_batch_dim(twin)
        rows, inputs, full = (t.movedim(dim, 0) for t in (twin(block_input), block_input, block(block_input)))
        assert torch.allclose(rows[kept], full[kept], atol=1e-12)
        if "post" in name:
            assert torch.allclose(rows[~kept], block.norm2(block.norm1(inputs[~kept])), atol=1e-12)
        else:
            assert torch.equal(rows[~kept], inputs[~kept])


@pytest.mark.parametrize("drop_unit", ["block", "branch"])
@pytest.mark.parametrize("kind", ["float", "bool", "per head"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_masks_of_a_transformer_reach_the_kept_rows(norm_first: bool, kind: str, drop_unit: str) -> None:
    torch.manual_seed(0)
    network = Encoder(norm_first, batch_first=True).double()
    plain = copy.deepcopy(network)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True], [False] * 5])
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if kind == "float":
        mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(mask, float("-inf"))
    elif kind == "per head":
        mask = torch.zeros(8, 5, 5, dtype=torch.float64) + torch.arange(8.0, dtype=torch.float64)[
            :, None, None
        ] * torch.randn(5, 5)
        padding = torch.zeros(4, 5, dtype=torch.float64).masked_fill(padding, float("-inf"))
    elif kind == "bool":
        pass
    if kind == "float":
        padding = torch.zeros(4, 5, dtype=torch.float64).masked_fill(padding, float("-inf"))
    masks = {"src_mask": mask, "src_key_padding_mask": padding}
    cf.apply_stochastic_depth(network, stochastic_method="sample", drop_rate=0.5, drop_unit=drop_unit)
    force(network, kept=[False, True, True, False])
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    block: Any = network.layers[0]
    twin = plain.layers[0]
    assert torch.allclose(block(x, **masks)[1:3], twin(x, **masks)[1:3], atol=1e-12)
    block.eval(), twin.eval()
    block.drop_rate = 0.0
    assert torch.allclose(block(x, **masks), twin(x, **masks), atol=1e-12)
    block.drop_rate = 1e-12  # through the branches, as good as unscaled
    assert torch.allclose(block(x, **masks)[0], twin(x, **masks)[0], atol=1e-9)


def test_an_encoder_that_makes_nested_tensors_is_refused_with_the_remedy() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"enable_nested_tensor must be False in a TransformerEncoder .*, got True"):
        cf.apply_stochastic_depth(nn.TransformerEncoder(layer, 2))
    cf.apply_stochastic_depth(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


@pytest.mark.parametrize("training", [True, False])
def test_the_input_can_be_given_by_name(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    x = torch.randn(3, 2, 8)
    expected = layer(x)
    cf.apply_stochastic_depth(layer, drop_rate=0.0).train(training)
    assert torch.allclose(layer(src=x), expected, atol=1e-6)


@pytest.mark.parametrize("make", ["torchvision", "timm"])
def test_another_activation_than_relu_is_applied_to_dropped_rows(make: str) -> None:
    """Only a ReLU leaves alone what has gone through it."""
    if make == "timm":
        network = timm.create_model("resnet18", act_layer="silu", num_classes=3)
    else:
        network = resnet18(num_classes=3)
        for module in network.modules():
            if hasattr(module, "relu"):
                module.relu = nn.SiLU()
    cf.apply_stochastic_depth(network, drop_rate=1.0, drop_distribution="uniform").eval()
    x = torch.randn(2, 3, 32, 32)
    never = network(x)
    for block in cf.stochastic_blocks(network):
        block.drop_rate = 1 - 1e-7
    assert torch.allclose(network(x), never, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(network(x), never, atol=1e-4)


def test_branches_are_dropped_separately_if_asked() -> None:
    network, x = build("ViT")
    cf.apply_stochastic_depth(network, drop_rate=0.5, drop_distribution="uniform", drop_unit="branch")
    blocks = cf.stochastic_blocks(network)
    assert [block.drop_indices for block in blocks] == [(0, 1), (2, 3)]
    plan = blocks[0].drop_plan
    plan.draw(0)
    plan.open()
    plan.decide([True, False, False, True])
    called = []
    for number, block in enumerate(blocks):
        block.self_attention.register_forward_hook(lambda *_, n=number: called.append(("attention", n)))
        block.mlp.register_forward_hook(lambda *_, n=number: called.append(("mlp", n)))
    network._forward_pre_hooks.clear()
    network(x)
    assert called == [("mlp", 0), ("attention", 1)]


def test_projections_can_be_protected() -> None:
    network, _ = build("ResNet BasicBlock")
    cf.apply_stochastic_depth(network, drop_rate=0.4, protect_projections=True)
    rates = [block.drop_rate for block in cf.stochastic_blocks(network)]
    assert rates == [0.1, 0.2, 0.0, 0.4]  # the third has the projection; the others keep their rates


@pytest.mark.parametrize("name", ["ViT", "pre-norm encoder"])
def test_protecting_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="protect_projections must protect some blocks and leave others"):
        cf.apply_stochastic_depth(build(name)[0], protect_projections=True)


class OwnBlock(nn.Module):
    """A block of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm(self.body(x))).tanh()


class WithShortcut(nn.Module):
    """A block that has a submodule called shortcut, as many have."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Linear(4, 4)
        self.residual = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


@pytest.fixture
def own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from etude.algorithms.stochastic_depth.stochastic_block import stochastic_class

    monkeypatch.setattr(registry, "BLOCK_TYPES", dict(BLOCK_TYPES))
    cf.register_residual_block(
        OwnBlock,
        residual=lambda block, x: block.norm(block.body(x)),
        after_sum=lambda block, y: y.tanh(),
        last_layer="norm",
    )
    cf.register_residual_block(
        WithShortcut,
        residual=lambda block, x: block.residual(x),
        shortcut=lambda block, x: block.shortcut(x),
        last_layer="residual",
        name="ShortcutBlock",
    )
    yield
    stochastic_class.cache_clear()


@pytest.mark.parametrize("method", ["block", "sample"])
@pytest.mark.parametrize("cls", [OwnBlock, WithShortcut])
def test_a_registered_block_works_like_the_known_ones(own_blocks: None, cls: type[nn.Module], method: str) -> None:
    network = nn.Sequential(cls(), cls()).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    plain = copy.deepcopy(network)
    cf.apply_stochastic_depth(network, stochastic_method=method, drop_rate=0.5)
    force(network, **({"dropped": True} if method == "block" else {"kept": [True, False, True, True]}))
    out, full = cf.stochastic_blocks(network)[0](x), plain[0](x)
    alone = x.tanh() if cls is OwnBlock else plain[0].shortcut(x)
    kept = torch.tensor([False] * 4 if method == "block" else [True, False, True, True])
    assert torch.allclose(out, torch.where(kept[:, None], full, alone))
    twin = pickle.loads(pickle.dumps(network))
    assert torch.equal(twin.eval()(x), network.eval()(x))
    before = network(x)
    assert torch.allclose(cf.fold_stochastic_depth(network)(x), before)


class Subclass(BasicBlock):
    """A subclass that is registered, of a class that is."""


def test_a_registered_subclass_is_converted_and_a_redefined_class_takes_the_place_of_the_old(own_blocks: None) -> None:
    cf.register_residual_block(Subclass, residual=lambda block, x: x)
    network = cf.apply_stochastic_depth(nn.Sequential(Subclass(4, 4), BasicBlock(4, 4)))
    assert len(cf.stochastic_blocks(network)) == 2
    again = type("Subclass", (BasicBlock,), {"__module__": Subclass.__module__, "__qualname__": "Subclass"})
    cf.register_residual_block(again, residual=lambda block, x: 2 * x)
    assert block_type_of(again).branches[0].residual(None, 1) == 2
    assert block_type_of(Subclass) is None


def test_target_layer_name_chooses_among_the_types(own_blocks: None) -> None:
    network = nn.Sequential(OwnBlock(), WithShortcut(), OwnBlock())
    cf.apply_stochastic_depth(network, target_layer_name="ShortcutBlock")
    assert [hasattr(block, "drop_plan") for block in network] == [False, True, False]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((OwnBlock(), len), TypeError, "cls must be a subclass of torch.nn.Module, got OwnBlock"),
        ((int, len), TypeError, "cls must be a subclass of torch.nn.Module, got <class 'int'>"),
        ((OwnBlock, "body"), TypeError, "residual must be a function of block and tensor, got 'body'"),
        ((OwnBlock, None), TypeError, "residual must be a function of block and tensor, got None"),
        ((Bottleneck, len), ValueError, "must not be registered already, got Bottleneck"),
    ],
)
def test_a_bad_registration_is_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    before = dict(registry.BLOCK_TYPES)
    with pytest.raises(error, match=message):
        cf.register_residual_block(*arguments)
    assert before == registry.BLOCK_TYPES


def test_an_unknown_model_is_refused_with_candidates_for_residual_blocks() -> None:
    reason = (
        r"may be residual: OwnBlock: not a known type .*; register_residual_block\(\.\.\.\) makes such a class known"
    )
    with pytest.raises(ValueError, match=f"model must contain residual blocks .*{reason}"):
        cf.apply_stochastic_depth(nn.Sequential(OwnBlock()))
    with pytest.raises(ValueError, match="of the known types it has ResNetBasicBlock"):
        cf.apply_stochastic_depth(build("ResNet BasicBlock")[0], target_layer_name="ResNetBottleneck")
