"""Blocks registered by the user, checked in their first forward."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etude.functional as cf
from etude.algorithms.stochastic_depth.blocks import registry
from etude.algorithms.stochastic_depth.stochastic_block import stochastic_class
from helpers.networks import tiny_resnet


class Layer(nn.Module):
    """A pre-norm layer with a mask that has a row per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.gamma = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x)) * mask
        return x + self.gamma * self.mlp(self.norm2(x))


class Net(nn.Module):
    """Two layers and their mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


def attention(block: Any, x: Tensor, mask: Tensor) -> Tensor:
    return block.mix(block.norm1(x)) * mask


def feed_forward(block: Any, x: Tensor, mask: Tensor) -> Tensor:
    return block.gamma * block.mlp(block.norm2(x))


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "BLOCK_TYPES", dict(registry.BLOCK_TYPES))
    yield
    stochastic_class.cache_clear()


def register(**options: Any) -> None:
    branches = [cf.Branch(attention, last_layer="mix"), cf.Branch(feed_forward, last_layer="gamma")]
    cf.register_block_type(Layer, cf.BlockType("Layer", branches, **options))


@pytest.mark.parametrize("drop_unit", ["block", "branch"])
def test_a_layer_of_two_branches_with_a_mask_per_sample(drop_unit: Any) -> None:
    register(row_arguments=["mask"])
    network = Net().double()
    plain = copy.deepcopy(network)
    x, mask = torch.randn(4, 4, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    cf.apply_stochastic_depth(network, stochastic_method="sample", drop_rate=0.5, drop_unit=drop_unit)
    block = cf.stochastic_blocks(network)[0]
    dropped = torch.tensor([True, False, False, True])
    block.drop_plan.decide(dropped.repeat(len(block.drop_plan.rates), 1).numpy())
    block.drop_plan.open()
    expected = torch.where(dropped[:, None], x, plain.layers[0](x, mask))
    assert torch.allclose(block(x, mask), expected, atol=1e-12)
    assert torch.allclose(block(x, mask=mask), expected, atol=1e-12)
    before = network.eval()(x, mask)
    assert torch.allclose(cf.fold_stochastic_depth(network)(x, mask), before, atol=1e-12)


def test_a_further_argument_with_rows_that_was_not_declared_is_named() -> None:
    register()
    network = cf.apply_stochastic_depth(Net(), stochastic_method="sample", drop_rate=0.5)
    with pytest.raises(ValueError, match=r"layers\.0 \(Layer\) cannot .* arguments with 4 rows: \['mask'\]"):
        network.eval().layers[0](torch.randn(4, 4), mask=torch.rand(4, 1))


def test_a_residual_that_broadcasts_its_rows_is_refused_instead_of_written_to_wrong_rows() -> None:
    register()
    network = cf.apply_stochastic_depth(Net(), stochastic_method="sample", drop_rate=0.5)
    with pytest.raises(ValueError, match=r"model\.layers\.0 \(Layer\) cannot be computed for some samples only"):
        network(torch.randn(2, 4), torch.rand(2, 1))


@pytest.mark.parametrize("training", [True, False])
def test_a_registration_that_forgets_a_factor_is_refused_with_the_difference(training: bool) -> None:
    cf.register_residual_block(Halved, residual=lambda block, x: block.linear(x))
    network = cf.apply_stochastic_depth(nn.Sequential(Halved()), drop_rate=0.0).train(training)
    state = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=r"model\.0 \(Halved\) must give the block's own output, the largest diff"):
        network(torch.randn(3, 4))
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


class Halved(nn.Module):
    """Half of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return x + 0.5 * self.linear(x)


class Pair(Halved):
    """A block with two outputs."""

    def forward(self, x: Tensor) -> Any:
        return x + self.linear(x), None


def test_a_block_with_a_tuple_as_output_is_refused() -> None:
    cf.register_residual_block(Pair, residual=lambda block, x: block.linear(x))
    network = cf.apply_stochastic_depth(nn.Sequential(Pair()), drop_rate=1.0)
    with pytest.raises(ValueError, match=r"model\.0 \(Pair\) must return a tensor .* its forward returns a tuple"):
        network(torch.randn(3, 4))


def test_a_block_behind_a_layer_without_relu_applies_its_own() -> None:
    """Only where the input is known to have gone through a ReLU is a dropped block its input."""
    blocks = tiny_resnet(2).module[2:4]
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), *blocks)
    for block in blocks:
        block.downsample = None
    network = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), blocks[1])
    cf.apply_stochastic_depth(network, drop_rate=1.0)
    x = torch.randn(4, 3, 5, 5)
    assert network(x).min() == 0
    assert network.eval()(x).min() == 0
