"""How a residual block splits: shortcut, residual branch, and what follows their sum."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Branch:
    """One residual step ``after_sum(shortcut(x) + residual(x))`` of a block.

    Every function takes the block first.

    Args:
        residual: ``(block, x, ...) -> f(x)``, what can be dropped. It gets the further arguments of the
            block's ``forward``, if there are any.
        shortcut: ``(block, x) -> s(x)``, always computed.
        after_sum: ``(block, y) -> z``, what follows the sum.
        input_is_final: Whether ``after_sum(x)`` is x for the inputs the block gets, so that a dropped
            branch with an identity shortcut returns its input. True if nothing follows the sum,
            and in a chain of blocks that all end in the same ReLU.
        ends_in_relu: Whether `after_sum` is only a ReLU and the inputs are final.
        last_layer: ``(block) -> layer``, the normalisation or linear layer that ends the residual
            branch and can absorb a factor; None if there is none.
        gives_new_tensor: Whether `residual` returns a tensor that is not used elsewhere, so that evaluation can
            add in place.
        layers: ``(block) -> layers`` that only `residual` uses; None if unknown.
    """

    residual: Callable[..., Tensor]
    shortcut: Callable[[Any, Tensor], Tensor] = lambda block, x: x
    after_sum: Callable[[Any, Tensor], Tensor] = lambda block, y: y
    input_is_final: Callable[[Any], bool] = lambda block: True
    ends_in_relu: Callable[[Any], bool] = lambda block: False
    last_layer: Callable[[Any], nn.Module | None] = lambda block: None
    gives_new_tensor: bool = False
    layers: Callable[[Any], Sequence[nn.Module]] | None = None

    def run(self, block: nn.Module, x: Tensor, scale: float, *args: Any, **kwargs: Any) -> Tensor:
        """The step with the residual branch multiplied by `scale`; with 0 the branch is not computed."""
        if scale == 0:
            return self.drop(block, x)
        residual = self.residual(block, x, *args, **kwargs)
        shortcut = self.shortcut(block, x)
        if self.gives_new_tensor and not torch.is_grad_enabled():
            return self.after_sum(block, torch.add(shortcut, residual, alpha=scale, out=residual))
        return self.after_sum(block, torch.add(shortcut, residual, alpha=scale))

    def drop(self, block: nn.Module, x: Tensor) -> Tensor:
        """The step without its residual branch."""
        shortcut = self.shortcut(block, x)
        if shortcut is x and self.input_is_final(block):
            return x
        return self.after_sum(block, shortcut)


@dataclass(frozen=True)
class BlockType:
    """The branches of one class of blocks, which together must be equivalent to its ``forward``.

    Args:
        name: Its name in `target_layer_name`.
        branches: The residual steps in the order in which they run.
        changes_shape: Whether the shortcut of a block is not the identity.
        batch_dim: The dimension of a block's input that counts the samples.
        select: ``(block, take, ...) -> (args, kwargs)``, the further arguments of ``forward`` for some
            samples only, where ``take(tensor)`` selects those from a tensor's first dimension.
        cls: The class, if a user registered it.
    """

    name: str
    branches: tuple[Branch, ...]
    changes_shape: Callable[[Any], bool] = lambda block: False
    batch_dim: Callable[[Any], int] = lambda block: 0
    select: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] = lambda block, take, *args, **kwargs: (args, kwargs)
    cls: type[nn.Module] | None = None
