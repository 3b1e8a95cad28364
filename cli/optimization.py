"""The optimizer and the learning rate schedule of a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .options import OptimizationOptions

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from ..engine import State


def check_optimization(options: OptimizationOptions) -> None:
    """Refuse options that are out of their range, or have no effect with the others.

    Raises:
        ValueError: With the option.
    """
    from ..engine.checks import check_number

    check_number("lr", options.lr, gt=0)
    check_number("weight_decay", options.weight_decay, ge=0)
    if options.head_lr is not None:
        check_number("head_lr", options.head_lr, gt=0)
    if options.momentum is not None:
        check_number("momentum", options.momentum, ge=0, lt=1)
    has_no_effect = {
        "momentum": (options.momentum is not None and options.optimizer != "sgd", "optimizer sgd"),
        "nesterov": (options.nesterov and options.optimizer != "sgd", "optimizer sgd"),
        "lr_milestones": (bool(options.lr_milestones) and options.lr_schedule != "multistep", "lr_schedule multistep"),
        "lr_gamma": (options.lr_gamma is not None and options.lr_schedule != "multistep", "lr_schedule multistep"),
        "lr_final": (
            options.lr_final is not None and options.lr_schedule not in ("linear", "cosine"),
            "lr_schedule linear or cosine",
        ),
        "clipping_type": (options.clipping_type != "norm" and options.gradient_clipping is None, "gradient_clipping"),
        "decay_norm_and_bias": (options.decay_norm_and_bias and options.weight_decay == 0, "a weight_decay above 0"),
    }
    for name, (is_given, needed) in has_no_effect.items():
        if is_given:
            raise ValueError(f"{name} must come with {needed} to have an effect, got {getattr(options, name)!r}")
    if options.lr_schedule == "multistep" and not options.lr_milestones:
        raise ValueError("lr_schedule multistep must come with lr_milestones, got none")
    if options.nesterov and options.momentum == 0:
        raise ValueError("nesterov must come with a momentum above 0, got 0")


def build_optimizer(options: OptimizationOptions, network: nn.Module, head: str) -> Optimizer:
    """The optimizer of the parameters that are trained.

    Args:
        options: Checked.
        network: The plain network.
        head: The name of its last layer, which may have a learning rate of its own.
    """
    from torch.optim import SGD, AdamW

    groups = _parameter_groups(options, network, head)
    if options.optimizer == "adamw":
        return AdamW(groups, lr=options.lr, weight_decay=options.weight_decay, fused=True)
    momentum = 0.9 if options.momentum is None else options.momentum
    return SGD(groups, lr=options.lr, momentum=momentum, nesterov=options.nesterov, weight_decay=options.weight_decay)


def build_schedule(options: OptimizationOptions) -> Callable[[State], float]:
    """The learning rate as a factor of its peak."""
    from .. import optim

    warmup, final = options.lr_warmup, 0.0 if options.lr_final is None else options.lr_final
    if options.lr_schedule == "constant":
        return optim.ConstantWithWarmupScheduler(warmup)
    if options.lr_schedule == "linear":
        return optim.LinearWithWarmupScheduler(warmup, alpha_f=final)
    if options.lr_schedule == "cosine":
        return optim.CosineAnnealingWithWarmupScheduler(warmup, alpha_f=final)
    gamma = 0.1 if options.lr_gamma is None else options.lr_gamma
    return optim.MultiStepWithWarmupScheduler(warmup, options.lr_milestones, gamma)


def _parameter_groups(options: OptimizationOptions, network: nn.Module, head: str) -> list[dict[str, Any]]:
    from ..optim import parameter_groups

    if options.decay_norm_and_bias:
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [{"params": trained, "weight_decay": options.weight_decay}]
    else:
        groups = parameter_groups(network, weight_decay=options.weight_decay)
    if options.head_lr is None:
        return groups
    of_head = {id(parameter) for parameter in network.get_submodule(head).parameters() if parameter.requires_grad}
    if not of_head:
        raise ValueError(f"head_lr must come with a last layer that is trained, {head} is frozen")
    split = []
    for group in groups:
        for is_head, lr in ((False, options.lr), (True, options.head_lr)):
            parameters = [parameter for parameter in group["params"] if (id(parameter) in of_head) == is_head]
            if parameters:
                split.append({**group, "params": parameters, "lr": lr})
    return split
