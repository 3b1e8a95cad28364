"""Finds the residual blocks of a model: by their known types, or by tracing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .blocks import BlockType, Branch, SplitError, block_type_of, has_marks, known_names, traced_type
from .blocks.drop_path import find_drop_paths


@dataclass(frozen=True)
class FoundBlock:
    """A block that can be dropped.

    Args:
        name: Where it is, such as ``model.layer1.0``.
        block: The block itself, not yet converted.
        block_type: How its class splits.
        branches: Its own residual branches.
    """

    name: str
    block: nn.Module
    block_type: BlockType
    branches: Sequence[Branch]


def find_blocks(model: nn.Module, target: str | type[nn.Module] | None) -> tuple[list[FoundBlock], dict[str, str]]:
    """The residual blocks of a model, in the order of its modules.

    Args:
        model: The model.
        target: Only blocks of this type or class, by name or as a class. Of a class that is named here, blocks
            are also traced where no drop path marks their residual branch.

    Returns:
        The blocks, and the names of others that may be residual, with the reason why they are left alone.

    Raises:
        ValueError: If there is none, or one that is asked for cannot be split.
    """
    found, unconverted = search_blocks(model, target)
    _check_no_nested_tensors(model, [one.block for one in found])
    if not found:
        raise ValueError(_nothing_found(model, target, unconverted))
    return found, unconverted


def search_blocks(
    model: nn.Module, target: str | type[nn.Module] | None = None
) -> tuple[list[FoundBlock], dict[str, str]]:
    """As `find_blocks`, for any model: there may be no block."""
    found: list[FoundBlock] = []
    unconverted: dict[str, str] = {}
    for path, module in model.named_modules():
        name = f"model.{path}" if path else "model"
        try:
            one = _split(name, module, target)
        except SplitError as error:
            if target is not None:
                raise ValueError(f"{name} ({type(module).__qualname__}) cannot be split: {error}") from error
            unconverted[name] = f"{type(module).__qualname__}: {error}"
            continue
        if one is not None:
            found.append(one)
        elif target is None and (reason := _may_be_residual(module)):
            unconverted[name] = f"{type(module).__qualname__}: {reason}"
    return found, _outside(model, found, unconverted)


def _outside(model: nn.Module, found: Sequence[FoundBlock], unconverted: dict[str, str]) -> dict[str, str]:
    """Without the modules inside of found blocks, and those around them, such as stages."""
    inside = {child for one in found for child in one.block.modules()}
    blocks = {one.block for one in found}
    modules = {f"model.{path}" if path else "model": module for path, module in model.named_modules()}
    return {
        name: why
        for name, why in unconverted.items()
        if modules[name] not in inside and blocks.isdisjoint(modules[name].modules())
    }


def _split(name: str, module: nn.Module, target: str | type[nn.Module] | None) -> FoundBlock | None:
    """The block that a module is, or None if it is none or not one that is asked for."""
    cls: Any = type(module)
    known = block_type_of(cls)
    is_named = target is not None and target in (cls, cls.__name__)
    if known is not None:
        if (target is not None and target != known.name and not is_named) or not known.is_residual(module):
            return None
        branches = _with_own_drop_path(name, module, known.branches_of(module))
        return FoundBlock(name, module, known, branches)
    if is_named or (target is None and has_marks(module)):
        traced = traced_type(cls)
        branches = traced.branches_of(module)
        if not branches and is_named:
            raise SplitError("no addition in its forward has a shortcut on one side")
        return FoundBlock(name, module, traced, branches) if branches else None
    _check_no_known_base(name, module, target)
    return None


def _with_own_drop_path(name: str, block: nn.Module, branches: Sequence[Branch]) -> Sequence[Branch]:
    """The branches of a registered block, with its drop path, which a single branch need not name.

    Raises:
        ValueError: If it is not clear in which branch a drop path is.
    """
    paths = set(find_drop_paths(block)) - {branch.drop_path for branch in branches}
    if not paths or any(branch.drop_path for branch in branches) or block_type_of(type(block)).is_verified:  # type: ignore[union-attr]
        return branches
    if len(branches) > 1 or len(paths) > 1:
        raise ValueError(
            f"the branches of {name} ({type(block).__qualname__}) must name its own drop paths {sorted(paths)}, one in "
            "each: Branch(..., drop_path=NAME)"
        )
    return [replace(branches[0], drop_path=paths.pop())]


def _check_no_known_base(name: str, module: nn.Module, target: str | type[nn.Module] | None) -> None:
    for base in type(module).__mro__[1:]:
        known = block_type_of(base)
        if known is not None and target in (None, known.name):
            cls = type(module).__qualname__
            raise ValueError(
                f"{name} is a {cls}, a subclass of {base.__qualname__}: only blocks of exactly a known type are "
                f"converted, since a subclass may compute something else; register_residual_block({cls}, ...) says "
                f"what it computes, target_layer_name={cls!r} traces it"
            )


def _check_no_nested_tensors(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """A TransformerEncoder with padding hands its layers nested tensors in evaluation, which do not split."""
    for module in model.modules():
        if getattr(module, "use_nested_tensor", False) and any(child in blocks for child in module.modules()):
            raise ValueError(
                f"enable_nested_tensor must be False in a {type(module).__name__} with stochastic depth, got True"
            )


def _nothing_found(model: nn.Module, target: str | type[nn.Module] | None, unconverted: dict[str, str]) -> str:
    known = {block_type.name for module in model.modules() if (block_type := block_type_of(type(module))) is not None}
    if target is not None:
        wanted = target if isinstance(target, str) else target.__name__
        message = f"model must contain blocks of type {wanted}, {type(model).__name__} contains none"
        if known:
            return f"{message}; of the known types it has {', '.join(sorted(known))}"
        return f"{message}; known are {', '.join(known_names())} and the classes of the model"
    message = (
        "model must contain residual blocks of a known type, or of a class with a drop path, "
        f"{type(model).__name__} contains none"
    )
    reasons = sorted(set(unconverted.values()))
    if without_shortcut := sorted(known - {reason.partition(":")[0] for reason in reasons}):
        message += f"; its blocks of type {', '.join(without_shortcut)} have no shortcut"
    if reasons:
        message += (
            f"; may be residual: {'; '.join(reasons)}; register_residual_block(...) makes such a class known, "
            "target_layer_name=CLASS traces it"
        )
    return message


def _may_be_residual(module: nn.Module) -> str | None:
    """Why a module that is not converted may still be a residual block, or None."""
    name = type(module).__name__.lower()
    if not any(part in name for part in ("block", "bottleneck", "residual", "encoderlayer", "decoderlayer")):
        return None
    if block_type_of(type(module)) is not None or has_marks(module) or not any(True for _ in module.parameters()):
        return None
    try:
        branches = traced_type(type(module)).branches_of(module)  # type: ignore[arg-type]  # mypy: a class has no hash
    except SplitError as error:
        return str(error)
    return "not a known type of block and without a drop path" if branches else None
