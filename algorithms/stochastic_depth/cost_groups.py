"""Groups blocks of equal cost, so that ranks that drop different blocks can drop the same amount of work."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import nn


def cost_groups(blocks: Sequence[nn.Module], plan_indices: Sequence[tuple[int, ...]]) -> list[int]:
    """Number the groups of equal compute.

    The compute of a layer is the number of its weights times the area of its feature map, and every stride divides
    the area of the following layers. So the ratios do not depend on the image size: in a ResNet, the identity
    blocks of all stages cost the same.

    Args:
        blocks: In forward order.
        plan_indices: For each block the indices of its branches in the plan, all the same where they are
            dropped together.

    Returns:
        For each index of the plan the number of its group, from 0.
    """
    area = Fraction(1)
    costs: dict[int, Any] = {}
    for block, indices in zip(blocks, plan_indices, strict=True):
        area /= _stride(block)
        weights = sum(parameter.numel() for parameter in block.parameters() if parameter.dim() > 1)
        for branch, index in enumerate(dict.fromkeys(indices)):
            costs[index] = weights * area, branch
    numbers = {cost: number for number, cost in enumerate(dict.fromkeys(costs.values()))}
    return [numbers[costs[index]] for index in sorted(costs)]


def _stride(block: nn.Module) -> int:
    """The factor by which a block divides the area; residual branch and shortcut have the same stride."""
    strides = [layer.stride for layer in block.modules() if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    return max((math.prod(stride) for stride in strides), default=1)
