"""Converted blocks: forward, drop rates, copies and pickling."""

import copy
import io
import pickle
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import etude.functional as cf
from etude.algorithms.stochastic_depth.plan import DropPlan
from etude.algorithms.stochastic_depth.stochastic_block import StochasticBlock
from etude.algorithms.stochastic_depth.surgery import stochastic_blocks
from helpers.networks import tiny_resnet


def batch_of(num_rows: int = 6, size: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(num_rows, 3, size, size), torch.randint(0, 3, (num_rows,))


def converted(method: str = "block", drop_rate: float = 0.5, num_blocks: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return cf.apply_stochastic_depth(tiny_resnet(num_blocks), stochastic_method=method, drop_rate=drop_rate)


def force_blocks(plan: DropPlan, dropped: bool) -> None:
    plan.draw(0)
    plan.open()
    plan.decide([dropped] * len(plan.rates))


def force_rows(plan: DropPlan, kept: np.ndarray) -> None:
    plan.draw(0, num_rows=len(kept))
    plan.open()
    plan.decide(np.tile(~kept, (len(plan.rates), 1)))


def plain_output(block: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
    """The block by hand, with the rows of `kept` computed together and the others on the shortcut."""
    shortcut = x if block.downsample is None else block.downsample(x)
    summed = shortcut.clone()
    if kept.any():
        out = block.bn1(block.conv1(x[kept])).relu()
        out = block.bn2(block.conv2(out)).relu()
        summed[kept] += block.bn3(block.conv3(out))
    return summed.relu()


@pytest.mark.parametrize("index", [0, 1], ids=["projection", "identity"])
@pytest.mark.parametrize("kept", ["111111", "000000", "101100", "011110"])
def test_sample_method_computes_the_kept_rows_and_passes_the_others_by(index: int, kept: str) -> None:
    model = converted("sample").double()
    block = stochastic_blocks(model)[index]
    channels = 4 if index == 0 else 16
    rows = np.array([character == "1" for character in kept])
    x = torch.rand(6, channels, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 16, 5, 5, dtype=torch.float64)
    force_rows(block.drop_plan, rows)

    def outcome(out: Tensor) -> list[Tensor]:
        used = (x, *block.parameters())
        gradients = torch.autograd.grad((out * weight).sum(), used, allow_unused=True)
        return [out, *(torch.zeros_like(p) if g is None else g for p, g in zip(used, gradients, strict=True))]

    actual = outcome(block(x))
    expected = outcome(plain_output(block, x, torch.tensor(rows)))
    assert len(actual) > 5
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("index", [0, 1], ids=["projection", "identity"])
def test_block_method_skips_the_residual_branch(index: int) -> None:
    model = converted("block")
    block = stochastic_blocks(model)[index]
    calls = []
    block.conv1.register_forward_hook(lambda *_: calls.append(1))
    force_blocks(block.drop_plan, dropped=True)
    x = torch.rand(2, 4 if index == 0 else 16, 5, 5)
    out = block(x)
    assert not calls
    assert torch.equal(out, plain_output(block, x, torch.zeros(2, dtype=torch.bool)))
    force_blocks(block.drop_plan, dropped=False)
    block(x)
    assert calls


def test_a_dropped_block_leaves_its_statistics_and_gradients_alone() -> None:
    model = converted("block")
    block = stochastic_blocks(model)[1]
    before = copy.deepcopy(block.state_dict())
    model._forward_pre_hooks.clear()
    force_blocks(block.drop_plan, dropped=True)
    batch = batch_of()
    model.loss(model(batch), batch).backward()
    assert all(parameter.grad is None for parameter in block.parameters())
    after = block.state_dict()
    assert before and all(torch.equal(before[name], after[name]) for name in before)


def test_the_projection_of_a_dropped_block_is_computed_and_trained() -> None:
    model = converted("block")
    first = stochastic_blocks(model)[0]
    force_blocks(first.drop_plan, dropped=True)
    first(torch.rand(2, 4, 5, 5)).sum().backward()
    assert first.downsample[0].weight.grad is not None
    assert first.conv1.weight.grad is None


@pytest.mark.parametrize("method", ["block", "sample"])
def test_evaluation_multiplies_the_branch_by_one_minus_the_rate(method: str) -> None:
    """Huang et al. 2016, equation 5."""
    model = converted(method, drop_rate=0.4).eval()
    for block in stochastic_blocks(model):
        channels = block.conv1.in_channels
        x = torch.rand(3, channels, 5, 5)
        out = block.relu(block.bn1(block.conv1(x)))
        out = block.bn3(block.conv3(block.relu(block.bn2(block.conv2(out)))))
        shortcut = x if block.downsample is None else block.downsample(x)
        assert torch.allclose(block(x), (shortcut + (1 - block.drop_rate) * out).relu(), atol=1e-6)


def test_a_rate_of_one_never_runs_in_training_and_counts_for_nothing_in_evaluation() -> None:
    model = cf.apply_stochastic_depth(tiny_resnet(), drop_rate=1.0, drop_distribution="uniform")
    calls = []
    for block in stochastic_blocks(model):
        block.conv1.register_forward_hook(lambda *_: calls.append(1))
    for mode in (True, False):
        assert model.train(mode)(batch_of()).isfinite().all()
    assert not calls


def test_sample_method_pads_a_single_kept_row_for_batchnorm() -> None:
    """One row of 1x1 maps has no statistics; it is computed with a neighbour, whose result is thrown away."""
    block = stochastic_blocks(converted("sample"))[1]
    rows = np.array([False, False, False, True])
    force_rows(block.drop_plan, rows)
    x = torch.rand(4, 16, 1, 1, requires_grad=True)
    out = block(x)
    pair = Bottleneck.forward(block, x[[3, 0]])  # the neighbour of the last row is the first
    assert torch.allclose(out[3], pair[0])
    assert torch.equal(out[:3], x[:3])
    (gradient,) = torch.autograd.grad(out[3].sum(), x)
    assert torch.equal(gradient[:3], torch.zeros(3, 16, 1, 1))


def test_sample_method_refuses_rows_that_are_not_samples() -> None:
    model = converted("sample")
    plan = stochastic_blocks(model)[1].drop_plan
    plan.draw(0, num_rows=6)
    plan.open()
    with pytest.raises(ValueError, match=r"6 samples were drawn for, model\.module\.3 \(Bottleneck\) got 5 rows"):
        stochastic_blocks(model)[1](torch.rand(5, 16, 4, 4))


def test_a_block_that_is_called_by_itself_is_dropped_at_its_rate() -> None:
    first, *_, last = stochastic_blocks(converted(drop_rate=1.0))
    x = torch.rand(2, 16, 4, 4)
    assert torch.equal(last(x), x)
    outputs = [first(torch.rand(2, 4, 4, 4)) for _ in range(20)]
    assert {output.shape for output in outputs} == {(2, 16, 4, 4)}


@pytest.mark.parametrize("method", ["block", "sample"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_converted_model_can_be_copied(method: str, how: str) -> None:
    model = converted(method)
    batch = batch_of()
    model(batch)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    blocks, twins = stochastic_blocks(model), stochastic_blocks(other)
    assert len(blocks) == len(twins) == 4
    assert [type(twin) for twin in twins] == [type(block) for block in blocks]
    assert all(twin.drop_plan is twins[0].drop_plan for twin in twins)
    assert twins[0].drop_plan is not blocks[0].drop_plan
    for _ in range(5):  # both continue with the same draws
        assert torch.equal(model(batch), other(batch))
    assert torch.equal(model.eval()(batch), other.eval()(batch))


def test_a_converted_block_is_still_of_its_own_class() -> None:
    block = stochastic_blocks(converted())[0]
    assert isinstance(block, Bottleneck)
    assert isinstance(block, StochasticBlock)
    assert type(block).__name__ == "StochasticBottleneck"


@pytest.mark.parametrize("method", ["block", "sample"])
def test_a_dropped_block_leaves_the_input_that_other_layers_need(method: Literal["block", "sample"]) -> None:
    """Its in-place ReLU must not be applied to a negative input that the layer before saved for its backward."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Tanh(), Bottleneck(16, 4))
    cf.apply_stochastic_depth(model, drop_rate=1.0, drop_distribution="uniform", stochastic_method=method)
    x = torch.randn(2, 3, 4, 4)
    found = model.train()(x)
    assert torch.equal(found, model[:2](x).relu())
    found.sum().backward()
    assert model[0].weight.grad is not None
