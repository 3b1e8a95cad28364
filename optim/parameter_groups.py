"""Parameter groups for an optimizer that exclude some parameters from weight decay."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..engine.checks import check_number

_NORMALIZATIONS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into a group with weight decay and a group without.

    As in the training scripts of timm and torchvision, these are not decayed: biases, parameters of normalization
    layers, all parameters with fewer than two dimensions (such as layer scales), and those that a module names in
    its method ``no_weight_decay()``, as timm's vision transformers do for their position embeddings. Parameters
    with ``requires_grad=False`` are in no group.

    .. code-block:: python

        optimizer = SGD(parameter_groups(model, weight_decay=5e-5), lr=0.5, momentum=0.9)

    Args:
        model: The model.
        weight_decay: Weight decay of the first group, at least 0.

    Returns:
        One or two groups, first the one with weight decay; empty groups are omitted.

    Raises:
        ValueError: If `weight_decay` is negative or not finite, or the model has no trainable parameter.
    """
    weight_decay = check_number("weight_decay", weight_decay, ge=0)
    excluded = set(_names_without_decay(model))
    groups: tuple[dict[str, Any], dict[str, Any]] = (
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_excluded = name in excluded or parameter.ndim <= 1 or name.rpartition(".")[2] == "bias"
            groups[is_excluded]["params"].append(parameter)
    if not any(group["params"] for group in groups):
        raise ValueError(f"model must have trainable parameters, {type(model).__name__} has none")
    return [group for group in groups if group["params"]]


def _names_without_decay(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        names = list(module.no_weight_decay()) if callable(getattr(module, "no_weight_decay", None)) else []
        if isinstance(module, _NORMALIZATIONS):
            names += [name for name, _ in module.named_parameters(recurse=False)]
        yield from (f"{prefix}.{name}" if prefix else name for name in names)
