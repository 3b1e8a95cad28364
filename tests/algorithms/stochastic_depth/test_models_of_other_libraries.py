"""Models of timm and torchvision as their users have them: with masks of their own, in parts, inside other models."""

import copy
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock

import etude.functional as cf

METHODS = pytest.mark.parametrize("method", ["block", "sample"])
Method = Literal["block", "sample"]


def share_of_dropped_rows(network: nn.Module, block: nn.Module, x: Tensor, num_calls: int, rectify: bool) -> float:
    """How many rows come out of a block as they went in, in forwards of the network."""
    seen: list[float] = []

    def compare(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        y = args[0].relu() if rectify else args[0]
        seen.append((output - y).flatten(1).abs().amax(1).le(1e-6).double().mean().item())

    hook = block.register_forward_hook(compare)
    with torch.no_grad():
        for _ in range(num_calls):
            network(x)
    hook.remove()
    return sum(seen) / len(seen)


def close(share: float, rate: float, num_draws: int) -> bool:
    """Within five standard deviations."""
    return abs(share - rate) < 5 * (rate * (1 - rate) / num_draws) ** 0.5


@pytest.mark.slow
@METHODS
def test_a_resnet_of_timm_with_its_own_rate_is_dropped_once(method: Method) -> None:
    """Both masks together would drop the last block in 0.75 of the cases."""
    network = timm.create_model("resnet18", drop_path_rate=0.5, num_classes=3, zero_init_last=False)
    cf.apply_stochastic_depth(network, stochastic_method=method, drop_rate=0.5, drop_distribution="uniform")
    num_calls, num_rows = 400, 2
    share = share_of_dropped_rows(network, network.layer4[1], torch.randn(num_rows, 3, 32, 32), num_calls, True)
    assert close(share, 0.5, num_calls * (num_rows if method == "sample" else 1))


@METHODS
def test_a_convnext_block_with_its_own_rate_is_dropped_at_the_given_rate(method: Method) -> None:
    """Not at its own 0.5, nor at both, 0.6, whichever way the block is computed."""
    network = nn.Sequential(CNBlock(4, 1.0, 0.5), CNBlock(4, 1.0, 0.5))
    cf.apply_stochastic_depth(network, stochastic_method=method, drop_rate=0.2, drop_distribution="uniform")
    num_calls, num_rows = 250, 4
    share = share_of_dropped_rows(network, network[1], torch.randn(num_rows, 4, 6, 6), num_calls, False)
    assert close(share, 0.2, num_calls * (num_rows if method == "sample" else 1))


class Gated(nn.Module):
    """A gate for each sample, which a user sets."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gate = torch.ones(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) * self.gate


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from etude.algorithms.stochastic_depth.blocks import registry

    monkeypatch.setattr(registry, "BLOCK_TYPES", dict(registry.BLOCK_TYPES))
    yield


@pytest.mark.parametrize("at_once", [True, False])
def test_a_residual_that_returns_more_rows_than_it_gets_is_refused(own_registry: None, at_once: bool) -> None:
    """It would be added to the wrong rows: at the first forward, and at later ones."""
    cf.register_residual_block(Gated, lambda block, x: block.linear(x) * block.gate)
    network: Any = cf.apply_stochastic_depth(nn.Sequential(Gated()), stochastic_method="sample", drop_rate=0.5)
    if not at_once:
        network(torch.randn(2, 4))
    network[0].gate = torch.rand(2, 1)
    with pytest.raises(ValueError, match=r"model\.0 \(Gated\)"):
        for _ in range(20):
            network(torch.randn(2, 4))


class Centred(Gated):
    """Rows that depend on each other."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x - x.mean(0))


def test_a_first_forward_with_one_sample_is_followed_by_a_check_of_rows(own_registry: None) -> None:
    cf.register_residual_block(Centred, lambda block, x: block.linear(x - x.mean(0)))
    network = cf.apply_stochastic_depth(nn.Sequential(Centred()), stochastic_method="sample", drop_rate=0.0)
    network(torch.randn(1, 4))
    with pytest.raises(ValueError, match=r"model\.0 \(Centred\) cannot be computed for some samples only"):
        network(torch.randn(4, 4))


def test_squeeze_and_excitation_needs_no_layer_to_fold_into_when_training_scales() -> None:
    network = timm.create_model("seresnet18", num_classes=3)
    plain = copy.deepcopy(network.state_dict())
    cf.fold_stochastic_depth(cf.apply_stochastic_depth(network, drop_rate=0.5, scaling="training"))
    assert all(torch.equal(value, plain[name]) for name, value in network.state_dict().items())


def test_both_halves_of_a_hybrid_are_converted() -> None:
    network = timm.create_model("vit_small_resnet26d_224", img_size=64, depth=3, num_classes=3)
    cf.apply_stochastic_depth(network, drop_rate=0.5)
    classes = [block.plain_class.__name__ for block in cf.stochastic_blocks(network)]
    assert classes == ["Bottleneck"] * 8 + ["Block"] * 3


def test_a_network_that_is_converted_in_part_says_what_stays(caplog: pytest.LogCaptureFixture) -> None:
    network = timm.create_model("gcvit_xxtiny", num_classes=3)
    cf.apply_stochastic_depth(network, drop_rate=0.5)
    assert "blocks are not converted: MbConvBlock: not a known type of block and without a drop path" in caplog.text


def test_a_dropped_block_after_a_layer_without_relu_rectifies_its_input() -> None:
    """The input of a block is what the layer before it computes, which may be negative."""
    block = timm.create_model("resnet18").layer1[0]
    network = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), block)
    cf.apply_stochastic_depth(network, drop_rate=1.0)
    x = torch.randn(4, 3, 5, 5)
    assert network(x).min() == 0
    assert network.eval()(x).min() == 0


def vit(**options: Any) -> Any:
    settings = {"img_size": 16, "patch_size": 8, "depth": 6, "embed_dim": 12, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **settings, **options)


@METHODS
def test_forward_features_draws_a_plan(method: Method) -> None:
    network = cf.apply_stochastic_depth(vit(), stochastic_method=method, drop_rate=0.5, drop_distribution="uniform")
    plan = cf.stochastic_blocks(network)[0].drop_plan
    seen = set()
    for _ in range(8):
        network.forward_head(network.forward_features(torch.randn(4, 3, 16, 16))).sum().backward()
        seen.add(plan.decisions.tobytes())
    assert len(seen) > 4


@METHODS
@pytest.mark.parametrize("converted", ["the backbone", "the whole model"])
def test_a_backbone_inside_a_larger_model_is_dropped(converted: str, method: Method) -> None:
    backbone = vit(drop_path_rate=0.4)
    model = nn.Sequential(backbone, nn.Linear(3, 2))
    cf.apply_stochastic_depth(backbone if converted == "the backbone" else model, stochastic_method=method)
    plan = cf.stochastic_blocks(model)[0].drop_plan
    seen = set()
    for _ in range(8):
        model(torch.randn(4, 3, 16, 16)).sum().backward()
        seen.add(plan.decisions.tobytes())
        assert [block.norm1.weight.grad is None for block in backbone.blocks] == [
            fraction == 1 for fraction in plan.dropped_fractions()
        ]
        model.zero_grad()
    assert len(seen) > 4


class DropPath(nn.Module):
    """A drop path as timm has it."""

    def __init__(self, drop_prob: float = 0.1) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x


class StochasticDepth(nn.Module):
    """A drop path as torchvision has it."""

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x


class TwoMasks(nn.Module):
    """The masks of two libraries in one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.mask1, self.mask2 = nn.Linear(4, 4), DropPath(), StochasticDepth()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mask2(self.mask1(self.linear(x)))


def test_the_masks_of_two_libraries_in_one_branch_are_refused(own_registry: None) -> None:
    network = nn.Sequential(TwoMasks())
    rates = [network[0].mask1.drop_prob, network[0].mask2.p]
    with pytest.raises(ValueError, match="TwoMasks: it has several drop paths in one branch"):
        cf.apply_stochastic_depth(network)
    cf.register_residual_block(TwoMasks, lambda block, x: block.mask2(block.mask1(block.linear(x))))
    with pytest.raises(ValueError, match=r"model\.0 \(TwoMasks\) must name its own drop paths \['mask1', 'mask2'\]"):
        cf.apply_stochastic_depth(network)
    assert type(network[0]) is TwoMasks
    assert rates == [network[0].mask1.drop_prob, network[0].mask2.p]
