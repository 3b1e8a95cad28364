"""Converts the residual blocks of a model and restores them, in place."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from .blocks.drop_path import rate_of, set_rate
from .cost_groups import cost_groups
from .discovery import FoundBlock, find_blocks
from .plan import DropPlan
from .ranks import check_parallel
from .rates import rates_over_depth
from .settings import DEFAULT_DROP_RATE, DropUnit, Settings
from .stochastic_block import TRANSIENT, StochasticBlock, stochastic_class

_log = logging.getLogger(__name__)


def convert(model: nn.Module, settings: Settings, *, seed: int) -> DropPlan:
    """Convert the blocks of a model; the caller draws the returned plan before each training forward.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If no block matches, the model has stochastic depth already, or it is wrapped for
            several ranks in a way that does not support the settings. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    check_parallel(model, ranks_may_differ=settings.ranks_may_differ)
    if stochastic_blocks(model):
        raise ValueError("model has stochastic depth already: remove_stochastic_depth(model) comes first")
    found, unconverted = find_blocks(model, settings.target_layer_name)
    indices = _plan_indices(found, settings.drop_unit)
    own_rates = _own_rates(found, indices)
    takes_over = settings.drop_rate is None and any(map(any, own_rates))
    if takes_over:
        settings.check_own_rates()
        _check_equal_rates(found, indices, own_rates)
        rates = [next(iter(rates)) for rates in own_rates]
    else:
        drop_rate = DEFAULT_DROP_RATE if settings.drop_rate is None else float(settings.drop_rate)
        rates = rates_over_depth(drop_rate, settings.drop_distribution, indices[-1][-1] + 1)
    if settings.protect_projections:
        _protect(found, indices, rates)
    plan = DropPlan(
        rates,
        method=settings.stochastic_method,
        draws=settings.draws,
        seed=seed,
        same_on_all_ranks=not settings.ranks_may_differ,
        groups=cost_groups([one.block for one in found], indices),
        scaling=settings.scaling or ("training" if takes_over else "evaluation"),
    )
    _log_what_is_special(found, own_rates, plan, unconverted, takes_over=takes_over)
    _log_layer_drop(model)
    for one, drop_indices in zip(found, indices, strict=True):
        _convert_block(one, plan, drop_indices)
    return plan


def restore(model: nn.Module) -> None:
    """Undo `convert`: every block gets its original class back, weights are unchanged.

    Raises:
        ValueError: If the model has no stochastic depth.
    """
    for block in required_blocks(model, "remove it"):
        for name, rate in block.own_drop_rates.items():
            set_rate(block, name, rate)
        for name in TRANSIENT:
            block.__dict__.pop(name, None)
        del block.drop_plan, block.drop_indices, block.block_name, block.own_drop_rates
        block.__class__ = block.plain_class  # type: ignore[assignment]  # back again


def compile_stochastic_blocks(model: nn.Module, **options: Any) -> nn.Module:
    """Compile each block separately; which blocks run is decided outside the graphs.

    There are no graph breaks inside a block, and no recompilations when rates or plans change.

    Args:
        model: A model with stochastic depth.
        options: For ``torch.compile``, such as ``mode`` or ``backend``.

    Returns:
        `model` itself, changed in place. Copies and pickles of it are not compiled.

    Raises:
        ValueError: If the model has no stochastic depth.
    """
    for block in required_blocks(model, "compile its blocks"):
        block.compile_branches(**options)
    return model


def stochastic_blocks(model: nn.Module) -> list[StochasticBlock]:
    """The converted blocks of a model, in forward order."""
    return [module for module in model.modules() if isinstance(module, StochasticBlock)]


def copy_drop_rates(model: nn.Module, averaged: nn.Module) -> None:
    """Give a copy of a model, such as ``torch.optim.swa_utils.AveragedModel``, the rates that the model has now.

    A copy keeps the rates of the moment when it was made. Without this, a copy made during a warmup evaluates
    with lower rates than the model.

    Args:
        model: A model with stochastic depth.
        averaged: A copy of it, or a wrapper around one, which was copied after the conversion.

    Raises:
        ValueError: If one of them has no stochastic depth, or their blocks are not the same.
    """
    source, target = (required_blocks(one, "copy drop rates") for one in (model, averaged))
    if [block.drop_indices for block in source] != [block.drop_indices for block in target]:
        raise ValueError(
            f"averaged must be a copy of the model, with its {len(source)} stochastic blocks, got {len(target)}"
        )
    target[0].drop_plan.set_rates(source[0].drop_plan.rates)


def required_blocks(model: nn.Module, purpose: str) -> list[StochasticBlock]:
    """The converted blocks of a model; a ValueError that names the purpose if there are none."""
    blocks = stochastic_blocks(model)
    if not blocks:
        raise ValueError(f"model must have stochastic depth to {purpose}, {type(model).__name__} has none")
    return blocks


def _convert_block(found: FoundBlock, plan: DropPlan, drop_indices: tuple[int, ...]) -> None:
    block: Any = found.block
    rates = {branch.drop_path: rate_of(block, branch) for branch in found.branches if branch.drop_path is not None}
    own_drop_rates = {name: rate for name, rate in rates.items() if rate}
    block.__class__ = stochastic_class(type(block))  # type: ignore[arg-type]  # mypy: a class has no hash
    block.drop_plan, block.drop_indices = plan, drop_indices
    block.block_name, block.own_drop_rates = found.name, own_drop_rates
    for name in own_drop_rates:
        set_rate(block, name, 0.0)


def _own_rates(found: Sequence[FoundBlock], plan_indices: Sequence[tuple[int, ...]]) -> list[set[float]]:
    """For each index of the plan the rates of the model's own drop paths, 0 where there is none."""
    rates: dict[int, set[float]] = {}
    for one, indices in zip(found, plan_indices, strict=True):
        for branch, index in zip(one.branches, indices, strict=True):
            rates.setdefault(index, set()).add(rate_of(one.block, branch))
    return [rates[index] for index in sorted(rates)]


def _check_equal_rates(
    found: Sequence[FoundBlock], plan_indices: Sequence[tuple[int, ...]], own_rates: Sequence[set[float]]
) -> None:
    """Refuse branches that are dropped together and have different rates of their own, with a ValueError."""
    for one, indices in zip(found, plan_indices, strict=True):
        if any(len(own_rates[index]) > 1 for index in indices):
            raise ValueError(
                f"the branches of {one.name} must have the same drop-path rate to be dropped together, got "
                f"{sorted(own_rates[indices[0]])}: drop_unit='branch' drops each by itself"
            )


def _log_what_is_special(
    found: Sequence[FoundBlock],
    own_rates: Sequence[set[float]],
    plan: DropPlan,
    unconverted: dict[str, str],
    *,
    takes_over: bool,
) -> None:
    highest = max(max(rates) for rates in own_rates)
    if takes_over:
        _log.info("the model's own drop-path rates up to %g are taken over (scaling=%r)", highest, plan.scaling)
    elif highest:
        _log.warning("drop rates up to %g replace the model's own drop-path rates up to %g", max(plan.rates), highest)
    for reason in sorted(set(unconverted.values())):
        names = [name for name, text in unconverted.items() if text == reason]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        _log.warning("%d blocks are not converted: %s (%s)", len(names), reason, shown)


def _log_layer_drop(model: nn.Module) -> None:
    """Warn of models of transformers that drop whole layers themselves, such as Wav2Vec2."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if rate := getattr(config, name, 0):
                _log.warning(
                    "%s skips layers itself (config.%s=%g), in addition to the drop rates: set it to 0",
                    type(module).__name__,
                    name,
                    rate,
                )
                return


def _plan_indices(found: Sequence[FoundBlock], drop_unit: DropUnit) -> list[tuple[int, ...]]:
    """For each block the indices of its branches in the plan."""
    indices, start = [], 0
    for one in found:
        num_branches = len(one.branches)
        step = num_branches if drop_unit == "branch" else 1
        indices.append(tuple(range(start, start + step)) if drop_unit == "branch" else (start,) * num_branches)
        start += step
    if drop_unit == "branch" and start == len(found):
        raise ValueError("drop_unit must be 'block' for blocks of a single branch, got 'branch'")
    return indices


def _protect(found: Sequence[FoundBlock], plan_indices: list[tuple[int, ...]], rates: list[float]) -> None:
    """Give the rate 0 to the blocks whose shortcut is more than the identity."""
    protected = [any(branch.is_projection(one.block) for branch in one.branches) for one in found]
    if not any(protected) or all(protected):
        which = "all" if all(protected) else "none"
        raise ValueError(
            f"protect_projections must protect some blocks and leave others, got a model where it is {which}"
        )
    for is_protected, indices in zip(protected, plan_indices, strict=True):
        for index in indices if is_protected else ():
            rates[index] = 0.0
