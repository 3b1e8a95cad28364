"""Optimizer updates that the device can skip."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

_FUSED = (SGD, Adam, AdamW, Adagrad)


def can_skip_update(optimizer: Optimizer) -> bool:
    """Whether an optimizer can skip its update according to a flag on the device, without a host synchronization.

    torch's fused optimizers can. SGD with dampening is excluded: its first step does not apply the dampening, but
    `step_unless` starts from a momentum buffer of zeros, to which it would be applied.
    """
    if type(optimizer) not in _FUSED or not optimizer.param_groups[0].get("fused"):
        return False
    return all(
        group.get("fused") and not (group.get("momentum") and group.get("dampening"))
        for group in optimizer.param_groups
    )


def step_unless(flag: Tensor, optimizers: Sequence[Optimizer]) -> list[tuple[Optimizer, nn.Parameter]]:
    """Step the optimizers, unless `flag` is 1 on the device.

    Args:
        flag: float32 scalar tensor, 0 or 1.
        optimizers: Optimizers for which `can_skip_update` is True.

    Returns:
        The parameters for which state was created; `remove_state` removes it if the flag was 1.
    """
    created: list[tuple[Optimizer, nn.Parameter]] = []
    for optimizer in optimizers:
        created += [(optimizer, parameter) for parameter in _without_state(optimizer)]
        fused: Any = optimizer  # fused optimizers read these attributes, which GradScaler sets
        fused.grad_scale, fused.found_inf = None, flag
        try:
            optimizer.step()
        finally:
            del fused.grad_scale, fused.found_inf
    return created


def remove_state(created: Sequence[tuple[Optimizer, nn.Parameter]]) -> None:
    """Remove the state that a skipped step created."""
    for optimizer, parameter in created:
        optimizer.state.pop(parameter, None)


def gradients(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """The gradients of all parameters of the optimizers; parameters without one are left out."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return [grad for group in groups for parameter in group["params"] if (grad := parameter.grad) is not None]


def _without_state(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters that have no optimizer state yet; momentum buffers of SGD are created here.

    Fused SGD fails if only some parameters of a group have a momentum buffer, and leaves new buffers uninitialized if
    the step is skipped.
    """
    found = []
    for group in optimizer.param_groups:
        if type(optimizer) is SGD and not group["momentum"]:
            continue
        for parameter in group["params"]:
            if parameter.grad is None or optimizer.state.get(parameter):
                continue
            found.append(parameter)
            if type(optimizer) is SGD:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(
                    parameter, memory_format=torch.preserve_format
                )
    return found
