"""Activation checkpointing: blocks are computed again in the backward pass instead of keeping their activations."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...engine import Algorithm, Event, Logger, State
from ..exclusion import check_only_one
from ..stochastic_depth import stochastic_blocks
from ..stochastic_depth.discovery import find_blocks
from ..stochastic_depth.stochastic_block import BATCHNORM


def apply_activation_checkpointing(
    model: nn.Module, checkpoint_fn: Callable[[nn.Module], bool] | None = None
) -> nn.Module:
    """Make blocks of a model keep only their inputs for the backward pass, which computes them again.

    Outputs, gradients and buffers stay the same: dropout repeats its random numbers, and the statistics of
    BatchNorm are updated once. A block that stochastic depth drops is not computed again.

    Args:
        model: Changed in place: the selected modules get an attribute ``forward``. Classes, parameters and
            ``state_dict`` stay the same, and copies and pickles of the model are checkpointed too.
        checkpoint_fn: Whether a module is checkpointed; by default the residual blocks that stochastic depth
            drops or could drop.

    Returns:
        `model` itself.

    Raises:
        ValueError: If no module is selected, or one is checkpointed already.
    """
    blocks = _residual_blocks(model) if checkpoint_fn is None else _selected(model, checkpoint_fn)
    for name, block in blocks.items():
        if "forward" in vars(block):
            is_ours = _is_checkpointed(block)
            reason = "activation checkpointing already" if is_ours else "a forward of its own instance"
            raise ValueError(f"model must not have {reason} where it is checkpointed, got it in {name!r}")
    for block in blocks.values():
        block.forward = partial(_checkpointed_forward, block)
    return model


def remove_activation_checkpointing(model: nn.Module) -> nn.Module:
    """Undo `apply_activation_checkpointing`.

    Args:
        model: Changed in place.

    Returns:
        `model` itself.

    Raises:
        ValueError: If nothing is checkpointed.
    """
    blocks = [module for module in model.modules() if _is_checkpointed(module)]
    if not blocks:
        raise ValueError(f"model must have activation checkpointing to remove it, {type(model).__name__} has none")
    for block in blocks:
        del block.forward
    return model


@dataclass(eq=False, repr=False)
class ActivationCheckpointing(Algorithm):
    """Saves memory for a longer backward pass (Chen et al. 2016, arXiv:1604.06174).

    Applied at INIT, see `apply_activation_checkpointing`. It works in any order with other algorithms.

    Args:
        checkpoint_fn: Takes a module and returns whether it is checkpointed; by default the residual blocks that
            stochastic depth drops or could drop.

    Raises:
        TypeError: If `checkpoint_fn` cannot be called.
        ValueError: At INIT, if no module is selected, or one is checkpointed already.
    """

    checkpoint_fn: Callable[[nn.Module], bool] | None = None

    def __post_init__(self) -> None:
        if self.checkpoint_fn is not None and not callable(self.checkpoint_fn):
            raise TypeError(f"checkpoint_fn must be a function of a module, got {self.checkpoint_fn!r}")

    def check_state(self, state: State) -> None:
        """Refuse a second one.

        Raises:
            ValueError: If there is one.
        """
        check_only_one(self, state, "one checkpoint_fn can select all modules")

    def match(self, event: Event, state: State) -> bool:
        """At INIT."""
        return event is Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Change the model."""
        apply_activation_checkpointing(state.model, self.checkpoint_fn)


def _residual_blocks(model: nn.Module) -> dict[str, nn.Module]:
    converted = set(stochastic_blocks(model))
    if converted:
        return {name: module for name, module in model.named_modules() if module in converted}
    return {one.name: one.block for one in find_blocks(model, None)[0]}


def _selected(model: nn.Module, checkpoint_fn: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    blocks = {name: module for name, module in model.named_modules() if checkpoint_fn(module)}
    if not blocks:
        raise ValueError(f"checkpoint_fn must select a module of {type(model).__name__}, it selects none")
    return blocks


def _is_checkpointed(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _checkpointed_forward


def _checkpointed_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(module).forward, module)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(_contexts, module), **kwargs)


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the forward and of its repetition."""
    return nullcontext(), _Repetition(module)


class _Repetition(AbstractContextManager[None]):
    """Repeats a forward with the buffers that it had, and leaves the buffers as they are.

    It may be entered several times, as a backward pass with ``retain_graph=True`` may be repeated.

    Args:
        module: What is going to be computed for the first time.
    """

    def __init__(self, module: nn.Module) -> None:
        layers = list(module.modules())
        self._buffers = list(module.buffers())
        # BatchNorm does not read its running statistics in training, so their values need not be kept.
        read = [layer for layer in layers if not (isinstance(layer, BATCHNORM) and layer.training)]
        self._read = [buffer for layer in read for buffer in layer.buffers(recurse=False)]
        self._values = [buffer.clone() for buffer in self._read]

    def __enter__(self) -> None:
        self._updated = [buffer.clone() for buffer in self._buffers]
        _set(self._read, self._values)

    def __exit__(self, *error: object) -> None:
        _set(self._buffers, self._updated)


def _set(buffers: list[Tensor], values: list[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.data.copy_(value)  # .data, as autograd would refuse a buffer that changed after it was read
