"""Expected and measured savings in MACs."""

import pytest
import torch
from torch import nn

import etude.functional as cf
from etude.algorithms.stochastic_depth.surgery import stochastic_blocks
from etude.models import composer_resnet
from helpers.networks import tiny_resnet


@pytest.mark.parametrize(
    ("name", "drop_rate", "percent"),
    [
        ("resnet50", 0.1, 4.7),
        ("resnet50", 0.2, 9.5),
        ("resnet50", 0.5, 23.7),
        ("resnet101", 0.4, 19.4),
        ("resnet152", 0.5, 24.5),
    ],
)
def test_the_known_savings_of_the_zoo(name: str, drop_rate: float, percent: float) -> None:
    with torch.device("meta"):
        model = composer_resnet(name)
    savings = cf.expected_savings(cf.apply_stochastic_depth(model, drop_rate=drop_rate))
    assert 100 * savings.expected == pytest.approx(percent, abs=0.05)


def test_macs_of_a_block_are_those_of_its_convolutions() -> None:
    model = cf.apply_stochastic_depth(tiny_resnet(2), drop_rate=0.5)
    savings = cf.expected_savings(model, (3, 6, 6))
    pixels = 36
    by_hand = [
        pixels * sum(c.weight.numel() for c in (block.conv1, block.conv2, block.conv3))
        for block in stochastic_blocks(model)
    ]
    assert [block.macs for block in savings.blocks] == by_hand
    assert [block.drop_rate for block in savings.blocks] == [0.25, 0.5]
    assert savings.expected == pytest.approx((0.25 * by_hand[0] + 0.5 * by_hand[1]) / savings.macs)
    assert savings.maximal == pytest.approx(sum(by_hand) / savings.macs)
    assert savings.share("macs", [1, 0]) == pytest.approx(by_hand[0] / savings.macs)


def test_counting_leaves_the_model_alone() -> None:
    model = cf.apply_stochastic_depth(tiny_resnet(), drop_rate=1.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rates = [block.drop_rate for block in stochastic_blocks(model)]
    savings = cf.expected_savings(model, (3, 6, 6))
    assert savings.blocks[-1].drop_rate == 1.0
    assert model.training
    assert [block.drop_rate for block in stochastic_blocks(model)] == rates
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(block._forward_pre_hooks for block in stochastic_blocks(model))


def test_a_model_without_stochastic_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have stochastic depth to save anything, Linear has none"):
        cf.expected_savings(nn.Linear(3, 3))


def test_every_part_of_a_model_is_counted_with_its_own_rates() -> None:
    first, second = tiny_resnet(2).module, tiny_resnet(2).module
    cf.apply_stochastic_depth(first[2:4], drop_rate=0.1, drop_distribution="uniform")
    cf.apply_stochastic_depth(second[3:4], drop_rate=0.9)
    model = nn.Sequential(first[:4], second[3:4])
    savings = cf.expected_savings(model, (3, 6, 6))
    assert [block.drop_rate for block in savings.blocks] == [0.1, 0.1, 0.9]


def test_memory_and_gradients_are_counted() -> None:
    model = cf.apply_stochastic_depth(tiny_resnet(2), drop_rate=0.5)
    savings = cf.expected_savings(model, (3, 6, 6))
    for block, cost in zip(stochastic_blocks(model), savings.blocks, strict=True):
        branch = [block.conv1, block.bn1, block.conv2, block.bn2, block.conv3, block.bn3]
        parameters = sum(p.numel() for module in branch for p in module.parameters())
        assert cost.parameters == parameters
        assert cost.gradient_bytes == 4 * parameters
        # kept per pixel: the input, before and after the two inner normalisations, before the last, and small change
        channels = block.conv1.in_channels + 4 * 4 + 16
        assert cost.activation_bytes == pytest.approx(4 * 36 * channels, rel=0.1)
    everything = sum(4 * p.numel() for p in model.parameters())
    assert savings.gradient_bytes == everything
    assert savings.share("gradient_bytes", [1, 1]) < 1
