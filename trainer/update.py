"""Optimizer updates that the device can skip."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from .torch_internals import flag_as_overflow, update_scale_unless

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


def unscale(optimizers: Sequence[Optimizer], scaler: GradScaler) -> None:
    """Divide the gradients by the scale of the loss, if it is scaled."""
    if scaler.is_enabled():
        for optimizer in filter(_has_gradient, optimizers):
            scaler.unscale_(optimizer)


def step_unless(
    flag: Tensor, optimizers: Sequence[Optimizer], scaler: GradScaler
) -> list[tuple[Optimizer, nn.Parameter]]:
    """Step the optimizers, unless `flag` is 1 on the device.

    Args:
        flag: float32 scalar tensor, 0 or 1.
        optimizers: Optimizers for which `can_skip_update` is False are stepped whatever `flag` is, unless gradients are
            scaled.
        scaler: If it is enabled, an optimizer also skips its update if its gradients are not finite. The scale is
            updated unless `flag` is 1.

    Returns:
        The parameters for which state was created; `remove_state` removes it if the flag was 1.
    """
    if scaler.is_enabled():
        return _step_scaled(flag, optimizers, scaler)
    created: list[tuple[Optimizer, nn.Parameter]] = []
    for optimizer in optimizers:
        if not can_skip_update(optimizer):
            optimizer.step()
            continue
        created += _initialize_state(optimizer)
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


def _step_scaled(
    flag: Tensor, optimizers: Sequence[Optimizer], scaler: GradScaler
) -> list[tuple[Optimizer, nn.Parameter]]:
    # GradScaler raises for an optimizer without any gradient, which happens if all its blocks are dropped.
    used = list(filter(_has_gradient, optimizers))
    created: list[tuple[Optimizer, nn.Parameter]] = []
    for optimizer in used:
        if can_skip_update(optimizer):
            created += _initialize_state(optimizer)
        flag_as_overflow(scaler, optimizer, flag)
        scaler.step(optimizer)  # which reads the flag for an optimizer that is not fused
    if used:
        update_scale_unless(scaler, flag)
    return created


def _has_gradient(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


def _initialize_state(optimizer: Optimizer) -> list[tuple[Optimizer, nn.Parameter]]:
    """The parameters that have no optimizer state yet; momentum buffers of SGD are created here.

    Fused SGD fails if only some parameters of a group have a momentum buffer, and leaves new buffers uninitialized if
    the step is skipped.
    """
    created: list[tuple[Optimizer, nn.Parameter]] = []
    for group in optimizer.param_groups:
        if type(optimizer) is SGD and not group["momentum"]:
            continue
        for parameter in group["params"]:
            if parameter.grad is None or optimizer.state.get(parameter):
                continue
            created.append((optimizer, parameter))
            if type(optimizer) is SGD:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(
                    parameter, memory_format=torch.preserve_format
                )
    return created
