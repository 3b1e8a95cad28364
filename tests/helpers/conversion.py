"""Checks that every converted network must pass."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import etude.functional as cf
from etude.algorithms.stochastic_depth.blocks.drop_path import find_drop_paths
from etude.algorithms.stochastic_depth.stochastic_block import StochasticBlock

Method = Literal["block", "sample"]


@dataclass(frozen=True)
class Call:
    """A block, and what its forward gets."""

    block: Any
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def calls_of(network: nn.Module, inputs: Any, is_block: Callable[[nn.Module], bool]) -> list[Call]:
    """The calls of some modules in a forward of the network."""
    calls: list[Call] = []

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(block, args[0].detach().clone(), args[1:], kwargs))

    hooks = [
        module.register_forward_pre_hook(keep, with_kwargs=True) for module in network.modules() if is_block(module)
    ]
    network(inputs)
    for hook in hooks:
        hook.remove()
    return calls


def outcome(network: nn.Module, inputs: Any) -> list[Tensor]:
    """The output, and the gradients of all parameters and of the input if it is a tensor."""
    torch.manual_seed(1)
    inputs = inputs.clone().requires_grad_() if isinstance(inputs, Tensor) else inputs
    out = network(inputs)
    used = [*network.parameters(), *([inputs] if isinstance(inputs, Tensor) else [])]
    gradients = torch.autograd.grad(out.square().sum(), used, allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(p) if grad is None else grad for p, grad in zip(used, gradients, strict=True)),
    ]


def without_masks(network: nn.Module) -> nn.Module:
    """A copy of a plain network whose own drop paths have the rate 0."""
    network = copy.deepcopy(network)
    for path in find_drop_paths(network):
        drop_path: Any = network.get_submodule(path)
        setattr(drop_path, "p" if hasattr(drop_path, "p") else "drop_prob", 0.0)
    return network


def check_rate_zero(network: nn.Module, inputs: Any, method: Method) -> None:
    """At the rate 0, the converted network trains as the plain one, split into its branches or not."""
    network = without_masks(network)
    expected = outcome(network, inputs)
    converted = cf.apply_stochastic_depth(copy.deepcopy(network), stochastic_method=method, drop_rate=0.0)
    assert list(converted.state_dict()) == list(network.state_dict())
    assert_close(outcome(converted, inputs), expected)
    for block in cf.stochastic_blocks(converted):
        block._plain_forward = _run_branches.__get__(block)  # type: ignore[method-assign]
    assert_close(outcome(converted, inputs), expected)


def _run_branches(block: StochasticBlock, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    for branch in block.block_type.branches_of(block, args, kwargs):
        x = branch.run(block, x, 1.0, *args, **kwargs)
    return x


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    """Equal to a relative difference, measured by the largest value."""
    for ours, theirs in zip(actual, expected, strict=True):
        scale = max(theirs.abs().max().item(), 1e-3) if theirs.numel() else 1.0
        difference = (ours - theirs).abs().max().item() if theirs.numel() else 0.0
        assert difference <= tolerance * scale, (difference, scale)


def check_training_folding_and_removal(network: nn.Module, inputs: Any, method: Method, *, folds: bool = True) -> None:
    """It trains with blocks dropped, a folded copy evaluates the same, and without it everything is as before."""
    state = copy.deepcopy(network.state_dict())
    converted = cf.apply_stochastic_depth(
        copy.deepcopy(network), stochastic_method=method, drop_rate=0.5, drop_distribution="uniform"
    )
    for block in cf.stochastic_blocks(converted):
        assert not {branch.drop_path for branch in block.block_type.branches_of(block)} & {*find_drop_paths(block)}
    for _ in range(3):
        assert all(value.isfinite().all() for value in outcome(converted, inputs))
    assert list(converted.state_dict()) == list(state)
    restored = cf.remove_stochastic_depth(copy.deepcopy(converted))
    assert repr(restored) == repr(network)
    assert find_drop_paths(restored) == find_drop_paths(network)
    assert [type(one) for one in restored.modules()] == [type(one) for one in network.modules()]
    converted.eval()
    before = converted(inputs)
    if folds:
        folded = cf.fold_stochastic_depth(converted)
        assert_close([folded(inputs)], [before], 1e-8)


def check_own_masks_taken_over(network: nn.Module, inputs: Tensor) -> None:
    """The model's own rates are used, and the last block that has one drops rows at its rate, not twice."""
    calls = {call.block: call for call in calls_of(network, inputs, lambda module: bool(find_drop_paths(module)))}
    converted = cf.apply_stochastic_depth(network, stochastic_method="sample")
    blocks = [block for block in cf.stochastic_blocks(converted) if block.own_drop_rates]
    assert blocks
    assert all(block.drop_rate in block.own_drop_rates.values() for block in blocks)
    assert blocks[-1].drop_plan.scaling == "training"
    share, num_rows = _share_of_dropped_rows(calls[blocks[-1]])
    rate = blocks[-1].drop_rate
    assert abs(share - rate) < 5 * (rate * (1 - rate) / num_rows) ** 0.5, (share, rate)
    cf.remove_stochastic_depth(network)


def _share_of_dropped_rows(call: Call, num_calls: int = 20, copies: int = 16) -> tuple[float, int]:
    """How many rows of a block come out as if all its branches were dropped, and of how many."""
    block, args, kwargs = call.block, call.args, call.kwargs
    shares = any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
    x = call.x if shares else torch.cat([call.x] * copies)
    num_calls *= copies if shares else 1
    dropped = 0.0
    with torch.no_grad():
        for _ in range(num_calls):
            out = block(x, *args, **kwargs)
            without = x
            for branch in block.block_type.branches_of(block, args, kwargs):
                without = branch.drop(block, without)
            dropped += (out - without).flatten(1).abs().amax(1).le(1e-12).double().mean().item()
    return dropped / num_calls, num_calls * len(x)
