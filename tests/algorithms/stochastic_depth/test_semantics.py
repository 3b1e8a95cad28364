"""Semantics of stochastic depth: expectation, scaling, activation checkpointing, compilation, dtypes."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import Bottleneck

import etude.functional as cf
from etude.algorithms.stochastic_depth.blocks import registry
from etude.algorithms.stochastic_depth.blocks.registry import BLOCK_TYPES
from helpers.networks import one_of_each_resnet, tiny_resnet

# Tracing looks at the gradients of inner tensors, and warns about itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0"),
]


class LinearBlock(nn.Module):
    """A residual block without any nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


@pytest.fixture
def linear_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BLOCK_TYPES", dict(BLOCK_TYPES))
    cf.register_residual_block(LinearBlock, residual=lambda block, x: block.linear(x), last_layer="linear")


@pytest.mark.parametrize("scaling", ["evaluation", "training"])
@pytest.mark.parametrize("draws", ["independent", "balanced"])
@pytest.mark.parametrize("method", ["block", "sample"])
def test_the_mean_of_many_stochastic_passes_is_the_evaluation(
    linear_block: None, method: str, draws: str, scaling: str
) -> None:
    """On a linear network the expectation of outputs and gradients is exact; tested at 5 sigma.

    Balanced draws make the blocks depend on each other, so there it holds for one block.
    """
    torch.manual_seed(0)
    num_blocks = 1 if (method, draws) == ("block", "balanced") else 3
    network = nn.Sequential(*(LinearBlock() for _ in range(num_blocks)))
    cf.apply_stochastic_depth(network, stochastic_method=method, drop_rate=0.5, draws=draws, scaling=scaling)
    x = torch.randn(4, 3, requires_grad=True)
    passes = [torch.cat([out := network(x), torch.autograd.grad(out.sum(), x)[0]], 1).detach() for _ in range(3000)]
    samples = torch.stack(passes)
    network.eval()
    out = network(x)
    expected = torch.cat([out, torch.autograd.grad(out.sum(), x)[0]], 1).detach()
    sigma = samples.std(0) / len(samples) ** 0.5
    assert sigma.max() > 0
    assert ((samples.mean(0) - expected).abs() <= 5 * sigma + 1e-6).all()


def test_scaling_in_training_leaves_evaluation_plain() -> None:
    model = tiny_resnet()
    plain = copy.deepcopy(model).eval()
    cf.apply_stochastic_depth(model, drop_rate=0.5, scaling="training")
    batch = torch.randn(3, 3, 6, 6), torch.zeros(3, dtype=torch.long)
    assert torch.equal(model.eval()(batch), plain(batch))


def test_scaling_in_training_at_a_rate_of_one_is_refused() -> None:
    model = tiny_resnet()
    with pytest.raises(ValueError, match='drop_rate must be below 1 with scaling="training", got 1'):
        cf.apply_stochastic_depth(model, drop_rate=1, scaling="training")
    with pytest.raises(ValueError, match='drop_rate must be below 1 with scaling="training", got 1'):
        cf.apply_stochastic_depth(model, drop_rate=0.5, drop_distribution=[0, 0, 1, 2], scaling="training")
    assert not cf.stochastic_blocks(model)
    cf.apply_stochastic_depth(model, drop_rate=0.5, scaling="training")
    with pytest.raises(ValueError, match='drop_rate must be below 1 with scaling="training", got 1'):
        cf.stochastic_blocks(model)[0].drop_rate = 1.0


def test_the_rate_of_a_block_can_be_set() -> None:
    model = cf.apply_stochastic_depth(tiny_resnet(), drop_rate=0.4)
    block = cf.stochastic_blocks(model)[1]
    block.drop_rate = 0.9
    assert [b.drop_rate for b in cf.stochastic_blocks(model)] == [0.1, 0.9, 0.4 * 3 / 4, 0.4]
    with pytest.raises(ValueError, match=r"drop_rate must be a number in \[0, 1\], got 1.1"):
        block.drop_rate = 1.1
    assert block.drop_rate == 0.9


class Checkpointed(nn.Module):
    """A chain of blocks that computes each again in the backward pass."""

    def __init__(self, model: nn.Sequential, use_reentrant: bool | None) -> None:
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for module in self.model:
            x = module(x) if self.use_reentrant is None else checkpoint(module, x, use_reentrant=self.use_reentrant)
        return x


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    for _ in range(3):
        run(x).square().sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("method", ["block", "sample"])
def test_checkpointed_blocks_have_the_gradients_of_plain_ones(method: str, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    models = [Checkpointed(tiny_resnet(6).module, reentrant) for reentrant in (None, use_reentrant)]
    models[1].load_state_dict(models[0].state_dict())
    results = []
    for model in models:
        cf.apply_stochastic_depth(model, stochastic_method=method, drop_rate=0.7, drop_distribution="uniform")
        results.append(gradients(model, model, x))
    assert any(g is not None for g in results[0])
    for plain, again in zip(*results, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.allclose(plain, again, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("method", ["block", "sample"])
def test_a_model_that_is_checkpointed_as_a_whole_keeps_its_plan(method: str, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    plain = tiny_resnet(6).module
    again = copy.deepcopy(plain)
    for model in (plain, again):
        cf.apply_stochastic_depth(model, stochastic_method=method, drop_rate=0.5, drop_distribution="uniform")
    first = gradients(plain, plain, x)
    second = gradients(again, lambda t: checkpoint(again, t, use_reentrant=use_reentrant), x)
    assert any(g is not None for g in first)
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["block", "sample"])
def test_compiled_blocks_are_compiled_once_for_all_drop_plans(method: str) -> None:
    torch._dynamo.reset()
    model = cf.apply_stochastic_depth(tiny_resnet(12).module, stochastic_method=method, drop_rate=0.5)
    plain = copy.deepcopy(model)
    counter = CompileCounter()
    cf.compile_stochastic_blocks(model, backend=counter, fullgraph=True)  # fullgraph: no graph break in a block
    blocks, twins = cf.stochastic_blocks(model), cf.stochastic_blocks(plain)
    x = torch.randn(8, 3, 6, 6)
    for _ in range(25):
        assert torch.allclose(model(x), plain(x), atol=1e-5)
    settled = counter.frame_count
    assert settled >= 12
    for rate in (0.1, 0.3, 0.6):
        for block in (*blocks, *twins):
            block.drop_rate = rate
        for _ in range(5):
            assert torch.allclose(model(x), plain(x), atol=1e-5)
    assert counter.frame_count == settled
    model.eval(), plain.eval()
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    settled = counter.frame_count
    for rate in (0.2, 0.4, 0.5):
        for block in (*blocks, *twins):
            block.drop_rate = rate
        assert torch.allclose(model(x), plain(x), atol=1e-5)
    assert counter.frame_count == settled


def test_copies_of_a_compiled_model_are_not_compiled() -> None:
    model = cf.apply_stochastic_depth(tiny_resnet().module)
    cf.compile_stochastic_blocks(model, backend="eager")
    other = copy.deepcopy(model)
    x = torch.randn(2, 3, 6, 6)
    assert torch.allclose(model.eval()(x), other.eval()(x), atol=1e-6)
    assert not any("_compiled" in vars(block) for block in cf.stochastic_blocks(other))
    cf.remove_stochastic_depth(model)
    assert not any("_compiled" in vars(module) for module in model.modules())


@pytest.mark.parametrize("method", ["block", "sample"])
def test_compiling_the_whole_model_works_around_the_blocks(method: str) -> None:
    torch._dynamo.reset()
    model = cf.apply_stochastic_depth(one_of_each_resnet(), stochastic_method=method, drop_rate=0.5)
    plain = copy.deepcopy(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    x = torch.randn(4, 3, 32, 32)
    counts = []
    for _ in range(8):
        assert torch.allclose(compiled(x), plain(x), atol=1e-4)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[-1] == counts[1]


def test_one_graph_for_the_whole_model_is_refused_with_advice() -> None:
    torch._dynamo.reset()
    model = cf.apply_stochastic_depth(tiny_resnet().module)
    with pytest.raises(Exception, match=r"compile the blocks with cf\.compile_stochastic_blocks\(model\)"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(2, 3, 6, 6))


def test_compiling_a_plain_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have stochastic depth to compile its blocks, Linear has none"):
        cf.compile_stochastic_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize("method", ["block", "sample"])
def test_half_precision_changes_neither_rates_nor_draws(method: str) -> None:
    """A mask drawn in bf16 would turn 0.001 into never; the draws know nothing of the tensors."""
    torch.manual_seed(0)
    full = cf.apply_stochastic_depth(tiny_resnet().module, stochastic_method=method, drop_rate=0.3)
    half = copy.deepcopy(full).to(torch.bfloat16)
    x = torch.randn(4, 3, 6, 6)
    for _ in range(20):
        out = half(x.to(torch.bfloat16))
        full(x)
        plans = [cf.stochastic_blocks(model)[0].drop_plan for model in (full, half)]
        assert plans[0].dropped_fractions() == plans[1].dropped_fractions()
    assert out.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        full(x).float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in full.parameters())


@pytest.mark.parametrize("method", ["block", "sample"])
def test_channels_last_is_kept(method: str) -> None:
    model = cf.apply_stochastic_depth(tiny_resnet().module, stochastic_method=method, drop_rate=0.5)
    model.to(memory_format=torch.channels_last)
    formats = []
    for block in cf.stochastic_blocks(model):
        block.register_forward_hook(
            lambda m, a, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    for _ in range(5):
        model(torch.randn(4, 3, 6, 6).contiguous(memory_format=torch.channels_last))
    assert len(formats) == 20
    assert all(formats)


def test_a_block_with_a_projection_keeps_the_gradients_channels_last() -> None:
    """In another format they would make every operation before the block convert."""
    downsample = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
    model = nn.Sequential(Bottleneck(8, 4, downsample=downsample)).to(memory_format=torch.channels_last)
    cf.apply_stochastic_depth(model, stochastic_method="sample", drop_rate=0.5, draws="balanced")
    x = torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    fractions = set()
    for _ in range(8):
        out = model(x)
        (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
        assert gradient.is_contiguous(memory_format=torch.channels_last)
        fractions.update(cf.stochastic_blocks(model)[0].drop_plan.dropped_fractions())
    assert fractions == {0.5}


@pytest.mark.parametrize("method", ["block", "sample"])
def test_a_part_of_the_model_can_be_called_in_training(method: str) -> None:
    """As with timm's `forward_features`: one plan for all blocks, a new one as soon as a block is called again."""
    model = cf.apply_stochastic_depth(tiny_resnet(4), stochastic_method=method, drop_rate=0.5)  # type: ignore[arg-type]
    plan = cf.stochastic_blocks(model)[0].drop_plan
    x = torch.randn(8, 3, 6, 6, requires_grad=True)
    seen = []
    for _ in range(6):
        model.module(x).sum().backward()
        seen.append(plan.decisions.tobytes())
    assert len(set(seen)) > 3
    model((x, None))
    assert plan.decisions.tobytes() not in seen[-1:]
    with pytest.raises(RuntimeError, match="drop plan was drawn"):
        plan.close()
        plan.check_open()


def test_copies_of_a_model_get_its_rates() -> None:
    model = cf.apply_stochastic_depth(tiny_resnet(4), drop_rate=0.0)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for block in cf.stochastic_blocks(model):
        block.drop_rate = 0.4
    cf.copy_drop_rates(model, averaged)
    assert [block.drop_rate for block in cf.stochastic_blocks(averaged)] == [0.4] * 4
    with pytest.raises(ValueError, match="averaged must be a copy of the model, with its 4 stochastic blocks, got 3"):
        cf.copy_drop_rates(model, cf.apply_stochastic_depth(tiny_resnet(3)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_two_checkpointed_forwards_before_a_backward_are_refused(use_reentrant: bool) -> None:
    """The plan of the first is gone, and its recomputation would silently be another network."""
    model = Checkpointed(tiny_resnet(6).module, use_reentrant)
    cf.apply_stochastic_depth(model, drop_rate=0.5)
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    for _ in range(2):  # one after the other is fine
        model(x).sum().backward()
    with pytest.raises(RuntimeError, match="each forward's backward must come before the next forward, got 2 forwards"):
        (model(x) + model(x)).sum().backward()


def test_two_forwards_before_a_backward_are_fine_without_checkpointing() -> None:
    model = cf.apply_stochastic_depth(tiny_resnet(6).module, drop_rate=0.5)
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    (model(x) + model(x)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_step_that_computes_nothing_again_does_not_count_against_the_next(use_reentrant: bool) -> None:
    """A dropped block with activation checkpointing saves and recomputes nothing."""
    model = Checkpointed(nn.Sequential(*(Bottleneck(16, 4) for _ in range(2))), use_reentrant)
    cf.apply_stochastic_depth(model, drop_rate=0.8, drop_distribution="uniform")
    x = torch.rand(4, 16, 6, 6, requires_grad=True)
    dropped = []
    for _ in range(30):
        model(x).sum().backward()
        dropped.append(tuple(cf.stochastic_blocks(model)[0].drop_plan.dropped_blocks))
    assert {(True, True), (False, True)} <= set(dropped)
