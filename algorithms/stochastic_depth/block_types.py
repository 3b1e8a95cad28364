"""How each type of residual block splits: shortcut, residual branch, and what follows their sum.

The types are named by their import path, so nothing is imported here that a model does not use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class BlockType:
    """How one type of block computes ``after_sum(shortcut(x) + residual(x))``.

    Every function takes the block first. In a block of this type the sum of the two branches must
    be all that the block's own ``forward`` does.

    Args:
        name: What `target_layer_name` calls it.
        residual: ``(block, x) -> f(x)``, the branch that can be dropped.
        shortcut: ``(block, x) -> s(x)``, always computed. It must return `x` itself, not a copy,
            where the shortcut is the identity.
        after_sum: ``(block, y) -> z``, what follows the sum.
        input_is_final: Whether `after_sum` leaves the block's input as it is, so that a dropped
            block with an identity shortcut returns its input. True in a chain of blocks that all
            end in the same ReLU.
        last_layer: Name of the last normalisation or linear layer of the residual branch, the one
            that can take over a factor; None where there is none.
    """

    name: str
    residual: Callable[[nn.Module, Tensor], Tensor]
    shortcut: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: x
    after_sum: Callable[[nn.Module, Tensor], Tensor] = lambda block, y: y
    input_is_final: bool = True
    last_layer: str | None = None

    def dropped(self, block: nn.Module, x: Tensor) -> Tensor:
        """The output of the block without its residual branch."""
        shortcut = self.shortcut(block, x)
        if shortcut is x and self.input_is_final:
            return x
        return self.after_sum(block, shortcut)


def _bottleneck_residual(block: Any, x: Tensor) -> Tensor:
    x = block.relu(block.bn1(block.conv1(x)))
    x = block.relu(block.bn2(block.conv2(x)))
    return block.bn3(block.conv3(x))


def _projection(block: Any, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)


def _relu(block: Any, y: Tensor) -> Tensor:
    return block.relu(y)


BLOCK_TYPES = {
    "torchvision.models.resnet.Bottleneck": BlockType(
        name="ResNetBottleneck",
        residual=_bottleneck_residual,
        shortcut=_projection,
        after_sum=_relu,
        last_layer="bn3",
    ),
}


def block_type_of(cls: type[nn.Module]) -> BlockType | None:
    """The registered type of exactly this class, None for any other, subclasses included."""
    return BLOCK_TYPES.get(f"{cls.__module__}.{cls.__qualname__}")
