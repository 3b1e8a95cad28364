"""The update: the optimizers step, unless the flag of the step holds them back on the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

_FUSED = (SGD, Adam, AdamW, Adagrad)


def can_hold_back(optimizer: Optimizer) -> bool:
    """Whether an optimizer can skip its update by a flag on the device, so that the host need not know it.

    torch's fused optimizers can. SGD with dampening is excepted, as its first step ignores the dampening, which
    the momentum buffer of zeros that `step_unless` begins with does not do.
    """
    if type(optimizer) not in _FUSED or not optimizer.param_groups[0].get("fused"):
        return False
    return all(
        group.get("fused") and not (group.get("momentum") and group.get("dampening"))
        for group in optimizer.param_groups
    )


def step_unless(flag: Tensor, optimizers: Sequence[Optimizer]) -> list[tuple[Optimizer, nn.Parameter]]:
    """Step optimizers that `can_hold_back`, unless the flag is 1 on the device.

    Args:
        flag: Float32, without dimensions, 0 or 1.
        optimizers: Each is stepped.

    Returns:
        The parameters for which state was created; `remove_state` removes it if the flag was 1.
    """
    created: list[tuple[Optimizer, nn.Parameter]] = []
    for optimizer in optimizers:
        created += [(optimizer, parameter) for parameter in _without_state(optimizer)]
        fused: Any = optimizer  # that reads these attributes, as the loss scaler sets them
        fused.grad_scale, fused.found_inf = None, flag
        try:
            optimizer.step()
        finally:
            del fused.grad_scale, fused.found_inf
    return created


def remove_state(created: Sequence[tuple[Optimizer, nn.Parameter]]) -> None:
    """Remove the state that a step created which was held back."""
    for optimizer, parameter in created:
        optimizer.state.pop(parameter, None)


def gradients(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """The gradients that the optimizers will use."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return [grad for group in groups for parameter in group["params"] if (grad := parameter.grad) is not None]


def _without_state(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters whose first step it is; SGD's momentum buffers are created here.

    By itself fused SGD fails where only some parameters have their first step, and leaves the buffers uninitialised
    where that step is held back.
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
