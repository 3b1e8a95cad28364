"""The private parts of torch that EMA depends on. tests/test_torch_internals.py checks each of them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def move_together(averages: Sequence[Tensor], tensors: Sequence[Tensor], weight: Tensor) -> None:
    """Add ``weight * (tensor - average)`` to each average in place, in a few kernels for all.

    Args:
        averages: Of one dtype on one device.
        tensors: As `averages`, of the same shapes.
        weight: Scalar on that device.
    """
    changes = torch._foreach_sub(list(tensors), list(averages))
    torch._foreach_mul_(changes, weight)
    torch._foreach_add_(list(averages), changes)
