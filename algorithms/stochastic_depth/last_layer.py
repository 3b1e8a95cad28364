"""The parameters in which the output of a residual branch is linear: those of its last layer."""

from typing import Any

from torch import Tensor, nn

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
    "etude.algorithms.blurpool.layers.BlurConv2d": _WEIGHT_AND_BIAS,
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


def last_parameters(block: Any, number: int, name: str) -> list[Tensor]:
    """The parameters and buffers to scale, so that a branch of a converted block is scaled.

    Args:
        block: The block, a `StochasticBlock`.
        number: Of the branch.
        name: Of the block, as ``model.layer1.0``, for errors.

    Raises:
        ValueError: If the branch ends in no layer that could take a factor.
    """
    layer: Any = block.block_type.branches_of(block)[number].get_last_layer(block)
    what = f"{name} ({block.plain_class.__qualname__})"
    if isinstance(layer, nn.Parameter):
        return [layer]
    attributes = None if layer is None else _SCALED.get(_import_path(layer))
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


def _import_path(layer: nn.Module) -> str:
    """Where the class of a layer is imported from, also if FSDP has put a class of its own before it."""
    kinds = (kind for kind in type(layer).__mro__ if not kind.__module__.startswith("torch.distributed.fsdp"))
    kind = next(kinds)
    return f"{kind.__module__}.{kind.__qualname__}"
