"""Puts stochastic depth into a model and takes it out again, block by block, in place."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .block_types import BlockType, block_type_of, known_names
from .cost_groups import cost_groups
from .plan import Draws, DropPlan, Scaling, StochasticMethod, is_in_backward, outside_of_graphs
from .ranks import check_active_ddp, check_parallel, check_same_plan, current_rank
from .rates import DropDistribution, check_distribution, check_rate, rates_over_depth
from .stochastic_block import StochasticBlock, stochastic_class

DropUnit = Literal["block", "branch"]

_CHOICES = {
    "stochastic_method": ("block", "sample"),
    "draws": ("independent", "balanced"),
    "scaling": ("evaluation", "training"),
    "drop_unit": ("block", "branch"),
}


def apply_stochastic_depth(
    model: nn.Module,
    target_layer_name: str | None = None,
    stochastic_method: StochasticMethod = "block",
    drop_rate: float = 0.2,
    drop_distribution: DropDistribution = "linear",
    use_same_gpu_seed: bool = True,
    *,
    draws: Draws = "independent",
    scaling: Scaling = "evaluation",
    drop_unit: DropUnit = "block",
    protect_projections: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Give the residual blocks of a model stochastic depth (Huang et al. 2016, arXiv:1603.09382).

    The model is changed in place: same modules, same parameters, same ``state_dict``, so an
    optimizer made before stays valid. Each converted block has a ``.drop_rate``, which may be set.
    Every forward of `model` in training mode draws anew which blocks sit out, from a generator of its
    own.

    Args:
        model: Any model with registered residual blocks inside.
        target_layer_name: Which type of block to convert, such as ``"ResNetBottleneck"``; by
            default every registered type.
        stochastic_method: ``"block"`` drops a block for the whole batch, ``"sample"`` for each row
            by itself. Both compute only what is kept.
        drop_rate: Probability in [0, 1] that the last block is dropped.
        drop_distribution: ``"linear"`` from ``drop_rate / L`` at the first of L blocks to
            `drop_rate` at the last, ``"uniform"``, L multipliers of `drop_rate`, or a function of l
            (1..L) and L that gives one.
        use_same_gpu_seed: Whether all ranks of a distributed run drop the same blocks (``"block"``
            method; the rows of the ``"sample"`` method are each rank's own).
        draws: ``"independent"`` (Huang et al.), or ``"balanced"``: the same rates with hardly any
            variation in how much is dropped from step to step.
        scaling: ``"evaluation"`` multiplies by 1 - rate there (Huang et al.), ``"training"`` by
            1 / (1 - rate) here.
        drop_unit: For blocks of several residual branches (transformers): drop the ``"block"``, or
            each ``"branch"`` by itself.
        protect_projections: Never drop a block whose shortcut is not the identity.
        seed: Of the draws; the same on all ranks.

    Returns:
        `model` itself.

    Raises:
        TypeError: If a number is expected and something else given.
        ValueError: If an argument is out of its range, no block matches, or the model has
            stochastic depth already. The model is then unchanged.
    """
    plan = convert(
        model,
        seed=seed,
        target_layer_name=target_layer_name,
        stochastic_method=stochastic_method,
        drop_rate=drop_rate,
        drop_distribution=drop_distribution,
        use_same_gpu_seed=use_same_gpu_seed,
        draws=draws,
        scaling=scaling,
        drop_unit=drop_unit,
        protect_projections=protect_projections,
    )
    first = stochastic_blocks(model)[0]
    draw = _DrawBeforeForward(plan, batch_dim=first.block_type.batch_dim(first))
    model.register_forward_pre_hook(draw, with_kwargs=True)
    model.register_forward_hook(_CloseAfterForward(plan), always_call=True)
    return model


def convert(model: nn.Module, *, seed: int, **settings: Any) -> DropPlan:
    """Convert the blocks of a model without deciding who draws: the caller draws the returned plan.

    Arguments and errors are those of `apply_stochastic_depth`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be a whole number, got {seed!r}")
    check_settings(**settings)
    may_differ = settings["stochastic_method"] == "sample" or not settings["use_same_gpu_seed"]
    check_parallel(model, ranks_may_differ=may_differ)
    blocks = _find_blocks(model, settings["target_layer_name"])
    indices = _place(blocks, settings["drop_unit"])
    rates = rates_over_depth(float(settings["drop_rate"]), settings["drop_distribution"], indices[-1][-1] + 1)
    if settings["protect_projections"]:
        _protect(blocks, indices, rates)
    plan = DropPlan(
        rates,
        method=settings["stochastic_method"],
        draws=settings["draws"],
        seed=seed,
        same_on_all_ranks=not may_differ,
        groups=cost_groups(blocks, indices),
        scaling=settings["scaling"],
    )
    classes = [stochastic_class(type(block)) for block in blocks]  # type: ignore[arg-type]  # mypy: a class has no hash
    for block, cls, places in zip(blocks, classes, indices, strict=True):
        block.__class__ = cls
        block.drop_plan, block.drop_indices = plan, places
    return plan


def check_settings(**settings: Any) -> None:
    """Refuse what is wrong with the arguments of `apply_stochastic_depth` whatever the model is."""
    target = settings["target_layer_name"]
    if target is not None and target not in known_names():
        raise ValueError(f"target_layer_name must be one of {', '.join(known_names())}, got {target!r}")
    for name, choices in _CHOICES.items():
        if settings[name] not in choices:
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {settings[name]!r}")
    for name in ("use_same_gpu_seed", "protect_projections"):
        if not isinstance(settings[name], bool):
            raise TypeError(f"{name} must be True or False, got {settings[name]!r}")
    rate = check_rate(settings["drop_rate"])
    if rate == 1 and settings["scaling"] == "training":
        raise ValueError(f'drop_rate must be below 1 with scaling="training", got {rate}')
    check_distribution(settings["drop_distribution"])


def remove_stochastic_depth(model: nn.Module) -> nn.Module:
    """Undo `apply_stochastic_depth`: every block is of its plain class again, weights unchanged.

    Returns:
        `model` itself.

    Raises:
        ValueError: If the model has no stochastic depth.
    """
    for block in required_blocks(model, "remove it"):
        block.__dict__.pop("_compiled", None)
        del block.drop_plan, block.drop_indices
        block.__class__ = block.plain_class  # type: ignore[assignment]  # back again
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, (_DrawBeforeForward, _CloseAfterForward)):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_always_called.pop(key, None)
    return model


def compile_stochastic_blocks(model: nn.Module, **options: Any) -> nn.Module:
    """Compile what the blocks compute, each by itself; which of them run is decided outside.

    No graph breaks inside a block, and nothing is compiled again when rates or plans change.

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
    """The converted blocks of a model that must have some; a ValueError says for what."""
    blocks = stochastic_blocks(model)
    if not blocks:
        raise ValueError(f"model must have stochastic depth to {purpose}, {type(model).__name__} has none")
    return blocks


def _place(blocks: list[Any], drop_unit: DropUnit) -> list[tuple[int, ...]]:
    """For each block the places of its branches in the plan."""
    places, place = [], 0
    for block in blocks:
        num_branches = len(_type_of(block).branches)
        step = num_branches if drop_unit == "branch" else 1
        places.append(tuple(range(place, place + step)) if drop_unit == "branch" else (place,) * num_branches)
        place += step
    if drop_unit == "branch" and place == len(blocks):
        raise ValueError("drop_unit must be 'block' for blocks of a single branch, got 'branch'")
    return places


def _protect(blocks: list[Any], places: list[tuple[int, ...]], rates: list[float]) -> None:
    """Give the rate 0 to the blocks whose shortcut is more than the identity."""
    protected = [_type_of(block).changes_shape(block) for block in blocks]
    if not any(protected) or all(protected):
        which = "all" if all(protected) else "none"
        raise ValueError(
            f"protect_projections must protect some blocks and leave others, got a model where it is {which}"
        )
    for is_protected, indices in zip(protected, places, strict=True):
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
    """A TransformerEncoder with padding hands its layers nested tensors in evaluation, which do not split."""
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


class _DrawBeforeForward:
    """A forward pre-hook that draws the plan, for a model that no Trainer drives."""

    def __init__(self, plan: DropPlan, batch_dim: int) -> None:
        self.plan = plan
        self.batch_dim = batch_dim
        self.step = 0

    @outside_of_graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A forward that is computed again for its backward pass keeps the plan it had.
        if module.training and not is_in_backward():
            num_rows = _num_rows((args, kwargs), self.batch_dim)
            if num_rows is None and self.plan.method == "sample":
                raise ValueError('stochastic_method="sample" needs a tensor among the model\'s inputs, got none')
            check_active_ddp()
            self.plan.draw(self.step, rank=current_rank(), num_rows=num_rows or 0)
            check_same_plan(self.plan, self.step)
            self.plan.open()
            self.step += 1
            if torch.is_grad_enabled():
                self.plan.count_forward()


class _CloseAfterForward:
    """A forward hook that ends the step."""

    def __init__(self, plan: DropPlan) -> None:
        self.plan = plan

    @outside_of_graphs
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.plan.close()
        if module.training and not is_in_backward():
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._begin_backward)

    def _begin_backward(self, grad: Tensor) -> None:
        self.plan.begin_backward()


def _num_rows(values: Any, batch_dim: int) -> int | None:
    """The size in `batch_dim` of the first tensor somewhere inside that has it."""
    return next((tensor.shape[batch_dim] for tensor in _tensors(values) if tensor.dim() > batch_dim), None)


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors somewhere inside."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)
