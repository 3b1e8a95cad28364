"""Folds the evaluation factor of each branch into its weights, for inference without stochastic depth."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from .standalone import remove_stochastic_depth
from .stochastic_block import StochasticBlock
from .surgery import required_blocks

_WEIGHT_AND_BIAS = ("weight", "bias")
_SCALED = {
    **{
        f"torch.nn.modules.{name}": _WEIGHT_AND_BIAS
        for name in (
            *("linear.Linear", "linear.NonDynamicallyQuantizableLinear"),
            *("conv.Conv1d", "conv.Conv2d", "conv.Conv3d"),
            *("batchnorm.BatchNorm1d", "batchnorm.BatchNorm2d", "batchnorm.BatchNorm3d", "batchnorm.SyncBatchNorm"),
            *("normalization.LayerNorm", "normalization.GroupNorm", "normalization.RMSNorm"),
        )
    },
    "etude.trainer.distributed.batchnorm.CPUSyncBatchNorm": _WEIGHT_AND_BIAS,
    "torchvision.models.convnext.LayerNorm2d": _WEIGHT_AND_BIAS,
    "timm.layers.norm_act.BatchNormAct2d": _WEIGHT_AND_BIAS,  # unless an activation follows
    "timm.layers.norm.LayerNorm": _WEIGHT_AND_BIAS,
    "timm.layers.norm.LayerNorm2d": _WEIGHT_AND_BIAS,
    "timm.layers.norm.GroupNorm": _WEIGHT_AND_BIAS,
    "timm.layers.norm.GroupNorm1": _WEIGHT_AND_BIAS,
    "timm.layers.norm.RmsNorm": _WEIGHT_AND_BIAS,
    "timm.layers.conv2d_same.Conv2dSame": _WEIGHT_AND_BIAS,
    "timm.layers.std_conv.ScaledStdConv2d": ("gain", "bias"),
    "timm.layers.std_conv.ScaledStdConv2dSame": ("gain", "bias"),
    "timm.layers.layer_scale.LayerScale": ("gamma",),
    "timm.layers.layer_scale.LayerScale2d": ("gamma",),
    "timm.models.vision_transformer.LayerScale": ("gamma",),
    "timm.models.metaformer.Scale": ("scale",),
    "transformers.pytorch_utils.Conv1D": _WEIGHT_AND_BIAS,
}
"""For the exact classes that can take over a factor, by import path, the parameters that their output is linear in."""


def fold_stochastic_depth(model: nn.Module) -> nn.Module:
    """Move each branch's ``1 - rate`` into its last layer and undo the surgery, in place.

    Evaluation gives the same outputs as before, to rounding error, and the weights load into the plain
    network anywhere. The folded network is for inference: an optimizer's state no longer fits it. With scaling
    in training there is no factor, and only the surgery is undone.

    Args:
        model: A model with stochastic depth; its current rates are folded.

    Returns:
        `model` itself, with its original blocks.

    Raises:
        ValueError: If the model has no stochastic depth, or a branch with a factor ends in no layer of its own
            that could take it. The model is then unchanged.
    """
    blocks = required_blocks(model, "fold")
    names = {module: name for name, module in model.named_modules()}
    factors = [
        (_last_parameters(block, number, names[block]), factor)
        for block in blocks
        for number, index in enumerate(block.drop_indices)
        if (factor := block.drop_plan.evaluation_scale(index)) != 1
    ]
    _check_not_shared(model, [parameter for parameters, _ in factors for parameter in parameters])
    with torch.no_grad():
        for parameters, factor in factors:
            for parameter in parameters:
                parameter.mul_(factor)
    return remove_stochastic_depth(model)


def _last_parameters(block: StochasticBlock, number: int, name: str) -> list[nn.Parameter]:
    """The parameters to scale, so that a branch of a block is scaled."""
    layer: Any = block.block_type.branches_of(block)[number].get_last_layer(block)
    what = f"model.{name} ({block.plain_class.__qualname__})"
    if isinstance(layer, nn.Parameter):
        return [layer]
    attributes = None if layer is None else _SCALED.get(f"{type(layer).__module__}.{type(layer).__qualname__}")
    if not isinstance(getattr(layer, "act", nn.Identity()), nn.Identity):
        attributes = None
    if layer is not None and attributes is None:
        raise ValueError(
            f"every branch must end in a normalisation or linear layer to fold into, whose class is known; {what} ends "
            f"in a {type(layer).__qualname__}, which may compute something else"
        )
    # A weight that is computed from others (a parametrization) would forget the factor.
    held: dict[str, Any] = {}
    if layer is not None:
        held = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    if attributes is None or held.get(attributes[0]) is None:
        raise ValueError(
            f"every branch must end in a normalisation or linear layer with weights to fold into, {what} does not"
        )
    return [held[attribute] for attribute in attributes if held.get(attribute) is not None]


def _check_not_shared(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    )
    uses = Counter(map(id, parameters))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in parameters:
        if owners[id(parameter)] > 1 or uses[id(parameter)] > 1:
            raise ValueError(f"a layer to fold into must not share its weights, model.{names[id(parameter)]} is shared")
