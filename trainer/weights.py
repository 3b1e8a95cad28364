"""Checks of the weights before a save or an evaluation."""

import torch
from torch import Tensor, nn

from . import distributed

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}  # by element size


def check_weights(model: nn.Module, step: int) -> None:
    """Check that parameters are finite and the same on all ranks. All ranks must call it together.

    Args:
        model: The model.
        step: Number of completed steps, for the message.

    Raises:
        FloatingPointError: If a parameter that requires a gradient is not finite.
        RuntimeError: If ranks have different weights.
    """
    with torch.no_grad():
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        finite = [_own(parameter).isfinite().all() for parameter in model.parameters() if parameter.requires_grad]
    bad = [name for name, is_finite in zip(names, _to_host(finite), strict=True) if not is_finite]
    if found := [name for of_rank in distributed.gather(bad) for name in of_rank]:
        raise FloatingPointError(f"the parameter {found[0]!r} is not finite after step {step}: it is not saved")
    check_same_weights(model, step)


@torch.no_grad()
def check_same_weights(model: nn.Module, step: int) -> None:
    """Check that all parameters, also frozen ones, are the same on all ranks. All ranks must call it together.

    Parameters that are sharded over the ranks are not compared.

    Raises:
        RuntimeError: If ranks differ; the message names a parameter.
    """
    if distributed.world_size() == 1:
        return
    copies = {name: p for name, p in model.named_parameters() if not hasattr(p, "full_tensor")}
    sums = _to_host([_sum_of_bits(parameter) for parameter in copies.values()])
    first, *others = distributed.gather(dict(zip(copies, sums, strict=True)))
    for rank, other in enumerate(others, start=1):
        if different := [name for name in {**first, **other} if first.get(name) != other.get(name)]:
            raise RuntimeError(
                f"all ranks must have the same weights, but after step {step} {different[0]!r} of rank {rank} is not "
                "that of rank 0"
            )


def _own(parameter: Tensor) -> Tensor:
    """The shard of a parameter on this rank."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _sum_of_bits(parameter: Tensor) -> Tensor:
    """The sum of the bit patterns of all elements as integers: a change of one bit changes it."""
    flat = parameter.detach().contiguous().reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)


def _to_host(values: list[Tensor]) -> list[int]:
    """Copy scalar tensors to the host with one synchronization per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for value in values:
        by_device.setdefault(value.device, []).append(value)
    on_host = {device: iter(torch.stack(group).tolist()) for device, group in by_device.items()}
    return [next(on_host[value.device]) for value in values]
