"""Converts the residual blocks of a model and restores them, in place."""

from typing import Any

from torch import nn

from .blocks import BlockType, block_type_of, known_names
from .cost_groups import cost_groups
from .plan import DropPlan
from .ranks import check_parallel
from .rates import rates_over_depth
from .settings import DropUnit, Settings
from .stochastic_block import StochasticBlock, stochastic_class


def convert(model: nn.Module, settings: Settings, *, seed: int) -> DropPlan:
    """Convert the blocks of a model; the caller draws the returned plan before each training forward.

    Raises:
        TypeError: If `model` is not a module or `seed` not an int.
        ValueError: If no block matches, the model has stochastic depth already, or it is wrapped for
            several ranks in a way that does not support the settings. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r}")
    check_parallel(model, ranks_may_differ=settings.ranks_may_differ)
    blocks = _find_blocks(model, settings.target_layer_name)
    indices = _plan_indices(blocks, settings.drop_unit)
    rates = rates_over_depth(float(settings.drop_rate), settings.drop_distribution, indices[-1][-1] + 1)
    if settings.protect_projections:
        _protect(blocks, indices, rates)
    plan = DropPlan(
        rates,
        method=settings.stochastic_method,
        draws=settings.draws,
        seed=seed,
        same_on_all_ranks=not settings.ranks_may_differ,
        groups=cost_groups(blocks, indices),
        scaling=settings.scaling,
    )
    classes = [stochastic_class(type(block)) for block in blocks]  # type: ignore[arg-type]  # mypy: a class has no hash
    for block, cls, drop_indices in zip(blocks, classes, indices, strict=True):
        block.__class__ = cls
        block.drop_plan, block.drop_indices = plan, drop_indices
    return plan


def restore(model: nn.Module) -> None:
    """Undo `convert`: every block gets its original class back, weights are unchanged.

    Raises:
        ValueError: If the model has no stochastic depth.
    """
    for block in required_blocks(model, "remove it"):
        block.__dict__.pop("_compiled", None)
        del block.drop_plan, block.drop_indices
        block.__class__ = block.plain_class  # type: ignore[assignment]  # the original class


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


def required_blocks(model: nn.Module, purpose: str) -> list[StochasticBlock]:
    """The converted blocks of a model; a ValueError that names the purpose if there are none."""
    blocks = stochastic_blocks(model)
    if not blocks:
        raise ValueError(f"model must have stochastic depth to {purpose}, {type(model).__name__} has none")
    return blocks


def _plan_indices(blocks: list[Any], drop_unit: DropUnit) -> list[tuple[int, ...]]:
    """For each block the indices of its branches in the plan."""
    indices, start = [], 0
    for block in blocks:
        num_branches = len(_type_of(block).branches)
        step = num_branches if drop_unit == "branch" else 1
        indices.append(tuple(range(start, start + step)) if drop_unit == "branch" else (start,) * num_branches)
        start += step
    if drop_unit == "branch" and start == len(blocks):
        raise ValueError("drop_unit must be 'block' for blocks of a single branch, got 'branch'")
    return indices


def _protect(blocks: list[Any], plan_indices: list[tuple[int, ...]], rates: list[float]) -> None:
    """Set the rate 0 for blocks whose shortcut is not the identity."""
    protected = [_type_of(block).changes_shape(block) for block in blocks]
    if not any(protected) or all(protected):
        which = "all" if all(protected) else "none"
        raise ValueError(
            f"protect_projections must protect some blocks and leave others, got a model where it is {which}"
        )
    for is_protected, indices in zip(protected, plan_indices, strict=True):
        for index in indices if is_protected else ():
            rates[index] = 0.0


def _type_of(block: nn.Module) -> BlockType:
    return _type_of_class(type(block))


def _type_of_class(cls: type[nn.Module]) -> BlockType:
    block_type = block_type_of(cls)
    assert block_type is not None, "only registered blocks are found"
    return block_type


def _find_blocks(model: nn.Module, target_layer_name: str | None) -> list[Any]:
    if stochastic_blocks(model):
        raise ValueError("model has stochastic depth already: remove_stochastic_depth(model) comes first")
    blocks: list[Any] = []
    for name, module in model.named_modules():
        cls = next((cls for cls in type(module).__mro__ if block_type_of(cls) is not None), None)
        if cls is None or target_layer_name not in (None, _type_of_class(cls).name):
            continue
        if cls is not type(module):
            raise ValueError(
                f"model.{name} is a {type(module).__qualname__}, a subclass of {cls.__qualname__}: only blocks of "
                f"exactly a registered type are converted, since a subclass may compute something else; "
                f"register_residual_block({type(module).__qualname__}, ...) says what it computes"
            )
        blocks.append(module)
    _check_no_nested_tensors(model, blocks)
    if not blocks:
        raise ValueError(_nothing_found(model, target_layer_name))
    return blocks


def _check_no_nested_tensors(model: nn.Module, blocks: list[Any]) -> None:
    """A TransformerEncoder with padding passes nested tensors to its layers in evaluation; they cannot be split."""
    for module in model.modules():
        if getattr(module, "use_nested_tensor", False) and any(child in blocks for child in module.modules()):
            raise ValueError(
                f"enable_nested_tensor must be False in a {type(module).__name__} with stochastic depth, got True"
            )


def _nothing_found(model: nn.Module, target_layer_name: str | None) -> str:
    wanted = target_layer_name or " or ".join(known_names())
    classes = {type(module) for module in model.modules()}
    known = sorted(block_type.name for cls in classes if (block_type := block_type_of(cls)) is not None)
    similar = sorted(cls.__qualname__ for cls in classes if _looks_residual(cls))
    message = f"model must contain blocks of type {wanted}, {type(model).__name__} contains none"
    if known:
        message += f"; of the known types it has {', '.join(known)}"
    elif similar:
        message += f"; {', '.join(similar)} may be residual: register_residual_block(...) makes such a class known"
    return message


def _looks_residual(cls: type[nn.Module]) -> bool:
    name = cls.__name__.lower()
    return any(part in name for part in ("block", "bottleneck", "residual", "encoderlayer", "decoderlayer"))
