"""Puts stochastic depth into a model and takes it out again, block by block, in place."""

from typing import Any

import torch
from torch import Tensor, nn

from .block_types import BLOCK_TYPES, block_type_of
from .plan import DropPlan, StochasticMethod
from .rates import DropDistribution, check_distribution, check_rate, rates_over_depth
from .stochastic_block import StochasticBlock, stochastic_class


def apply_stochastic_depth(
    model: nn.Module,
    target_layer_name: str | None = None,
    stochastic_method: StochasticMethod = "block",
    drop_rate: float = 0.2,
    drop_distribution: DropDistribution = "linear",
    use_same_gpu_seed: bool = True,
    *,
    seed: int = 0,
) -> nn.Module:
    """Give the residual blocks of a model stochastic depth (Huang et al. 2016, arXiv:1603.09382).

    The model is changed in place: same modules, same parameters, same ``state_dict``, so an
    optimizer made before stays valid. Each converted block has a ``.drop_rate``. Every forward of
    `model` in training mode draws anew which blocks sit out, from a generator of its own.

    Args:
        model: Any model with registered residual blocks inside.
        target_layer_name: Which type of block to convert, such as ``"ResNetBottleneck"``; by
            default every registered type.
        stochastic_method: ``"block"`` drops a block for the whole batch, ``"sample"`` for each row
            by itself. Both compute only what is kept.
        drop_rate: Probability in [0, 1] that the last block is dropped.
        drop_distribution: ``"linear"`` from ``drop_rate / L`` at the first of L blocks to
            `drop_rate` at the last, or ``"uniform"``.
        use_same_gpu_seed: Whether all ranks of a distributed run drop the same blocks.
        seed: Of the draws; the same on all ranks.

    Returns:
        `model` itself.

    Raises:
        TypeError: If `drop_rate` is not a number.
        ValueError: If an argument is out of its range, no block matches, or the model has
            stochastic depth already. The model is then unchanged.
    """
    plan = convert(model, target_layer_name, stochastic_method, drop_rate, drop_distribution, use_same_gpu_seed, seed)
    model.register_forward_pre_hook(_DrawBeforeForward(plan), with_kwargs=True)
    return model


def convert(
    model: nn.Module,
    target_layer_name: str | None,
    stochastic_method: StochasticMethod,
    drop_rate: float,
    drop_distribution: DropDistribution,
    use_same_gpu_seed: bool,
    seed: int,
) -> DropPlan:
    """Convert the blocks of a model without deciding who draws: the caller draws the returned plan.

    Arguments and errors are those of `apply_stochastic_depth`.
    """
    check_method(stochastic_method)
    check_distribution(drop_distribution)
    rate = check_rate(drop_rate)
    blocks = _find_blocks(model, target_layer_name)
    plan = DropPlan(
        rates_over_depth(rate, drop_distribution, len(blocks)),
        method=stochastic_method,
        seed=seed,
        same_on_all_ranks=use_same_gpu_seed,
    )
    classes = [stochastic_class(type(block)) for block in blocks]  # type: ignore[arg-type]  # mypy: a class has no hash
    for index, (block, cls) in enumerate(zip(blocks, classes, strict=True)):
        block.__class__ = cls
        block.drop_plan, block.drop_index = plan, index
    return plan


def remove_stochastic_depth(model: nn.Module) -> nn.Module:
    """Undo `apply_stochastic_depth`: every block is of its plain class again, weights unchanged.

    Returns:
        `model` itself.

    Raises:
        ValueError: If the model has no stochastic depth.
    """
    blocks = stochastic_blocks(model)
    if not blocks:
        raise ValueError(f"model must have stochastic depth to remove it, {type(model).__name__} has none")
    for block in blocks:
        del block.drop_plan, block.drop_index
        block.__class__ = block.plain_class  # type: ignore[assignment]  # back again
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _DrawBeforeForward):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def stochastic_blocks(model: nn.Module) -> list[StochasticBlock]:
    """The converted blocks of a model, in forward order."""
    return [module for module in model.modules() if isinstance(module, StochasticBlock)]


def check_method(stochastic_method: str) -> None:
    """Refuse an unknown method with a ValueError."""
    if stochastic_method not in ("block", "sample"):
        raise ValueError(f"stochastic_method must be 'block' or 'sample', got {stochastic_method!r}")


def check_target(target_layer_name: str | None) -> None:
    """Refuse a name that no registered block type has, with a ValueError."""
    known = [block_type.name for block_type in BLOCK_TYPES.values()]
    if target_layer_name is not None and target_layer_name not in known:
        raise ValueError(f"target_layer_name must be one of {', '.join(known)}, got {target_layer_name!r}")


def _find_blocks(model: nn.Module, target_layer_name: str | None) -> list[Any]:
    check_target(target_layer_name)
    if stochastic_blocks(model):
        raise ValueError("model has stochastic depth already: remove_stochastic_depth(model) comes first")
    blocks: list[Any] = []
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            block_type = block_type_of(cls)
            if block_type is None or target_layer_name not in (None, block_type.name):
                continue
            if cls is not type(module):
                raise ValueError(
                    f"model.{name} is a {type(module).__qualname__}, a subclass of {cls.__qualname__}: only blocks of "
                    f"exactly a registered type are converted, since a subclass may compute something else"
                )
            blocks.append(module)
    if not blocks:
        wanted = target_layer_name or " or ".join(block_type.name for block_type in BLOCK_TYPES.values())
        raise ValueError(f"model must contain blocks of type {wanted}, {type(model).__name__} contains none")
    return blocks


class _DrawBeforeForward:
    """A forward pre-hook that draws the plan, for a model that no Trainer drives."""

    def __init__(self, plan: DropPlan) -> None:
        self.plan = plan
        self.step = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            self.plan.draw(self.step, rank=_rank(), num_rows=_num_rows((args, kwargs)) or 0)
            self.step += 1


def _rank() -> int:
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if is_distributed else 0


def _num_rows(values: Any) -> int | None:
    """The first dimension of the first tensor somewhere inside."""
    if isinstance(values, Tensor):
        return len(values) if values.dim() else None
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return None
    return next((rows for value in values if (rows := _num_rows(value)) is not None), None)
