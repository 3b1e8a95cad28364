"""torchvision: ResNet, RegNet, ConvNeXt, EfficientNet, MobileNet, MNASNet, ViT, Swin, MaxViT."""

from typing import Any

from torch import Tensor, nn

from .branch import BlockType, Branch

# ResNet, ResNeXt, Wide ResNet, RegNet


def basic_residual(block: Any, x: Tensor) -> Tensor:
    """Two convolutions with normalisation."""
    x = block.relu(block.bn1(block.conv1(x)))
    return block.bn2(block.conv2(x))


def _bottleneck_residual(block: Any, x: Tensor) -> Tensor:
    x = block.relu(block.bn1(block.conv1(x)))
    x = block.relu(block.bn2(block.conv2(x)))
    return block.bn3(block.conv3(x))


def projection(block: Any, x: Tensor) -> Tensor:
    """The shortcut of a ResNet block: ``downsample``, or the identity."""
    return x if block.downsample is None else block.downsample(x)


def has_projection(block: Any) -> bool:
    """Whether the shortcut has parameters."""
    return block.downsample is not None


def all_but_projection(block: Any) -> list[nn.Module]:
    """The layers of the residual branch."""
    return [layer for name, layer in block.named_children() if name != "downsample"]


def relu(block: Any, y: Tensor) -> Tensor:
    """The block's activation."""
    return block.relu(y)


def ends_in_relu(block: Any) -> bool:
    """Whether that activation is exactly a ReLU."""
    return type(block.relu) is nn.ReLU


def _regnet_shortcut(block: Any, x: Tensor) -> Tensor:
    return x if block.proj is None else block.proj(x)


# ConvNeXt


def _convnext_residual(block: Any, x: Tensor) -> Tensor:
    return block.stochastic_depth(block.layer_scale * block.block(x))


# EfficientNet, MobileNet, MNASNet


def _mbconv_residual(block: Any, x: Tensor) -> Tensor:
    return block.stochastic_depth(block.block(x))


def _uses_res_connect(block: Any) -> bool:
    return block.use_res_connect


# ViT, Swin, MaxViT


def _vit_attention(block: Any, x: Tensor) -> Tensor:
    x = block.ln_1(x)
    return block.dropout(block.self_attention(x, x, x, need_weights=False)[0])


def _maxvit_partition(block: Any, x: Tensor) -> Tensor:
    return block.partition_swap(block.partition_op(x, block.p))


def _maxvit_departition(block: Any, x: Tensor) -> Tensor:
    grid_height, grid_width = block.grid_size[0] // block.p, block.grid_size[1] // block.p
    return block.departition_op(block.departition_swap(x), block.p, grid_height, grid_width)


def _layers(*names: str) -> Any:
    return lambda block: [getattr(block, name) for name in names]


def _resnet_branch(residual: Any, last_layer: str) -> Branch:
    return Branch(
        residual,
        projection,
        relu,
        projects=has_projection,
        ends_in_relu=ends_in_relu,
        last_layer=last_layer,
        layers=all_but_projection,
        gives_new_tensor=True,
    )


def _mbconv(name: str, last_layer: Any) -> BlockType:
    branch = Branch(_mbconv_residual, last_layer=last_layer, drop_path="stochastic_depth", layers=_layers("block"))
    return BlockType(name, [branch], is_residual=_uses_res_connect)


def _swin(name: str, *residuals: Any, last_layers: tuple[str, str]) -> BlockType:
    layers = _layers("norm1", "attn"), _layers("norm2", "mlp")
    return BlockType(
        name,
        [
            Branch(residual, drop_path="stochastic_depth", last_layer=last, layers=part)
            for residual, last, part in zip(residuals, last_layers, layers, strict=True)
        ],
    )


BLOCK_TYPES = {
    "torchvision.models.resnet.BasicBlock": BlockType("ResNetBasicBlock", [_resnet_branch(basic_residual, "bn2")]),
    "torchvision.models.resnet.Bottleneck": BlockType(
        "ResNetBottleneck", [_resnet_branch(_bottleneck_residual, "bn3")]
    ),
    "torchvision.models.regnet.ResBottleneckBlock": BlockType(
        "RegNetBottleneck",
        [
            Branch(
                lambda block, x: block.f(x),
                _regnet_shortcut,
                lambda block, y: block.activation(y),
                projects=lambda block: block.proj is not None,
                ends_in_relu=lambda block: type(block.activation) is nn.ReLU,
                last_layer="f.c.1",
                layers=_layers("f"),
                gives_new_tensor=True,
            )
        ],
    ),
    "torchvision.models.convnext.CNBlock": BlockType(
        "ConvNeXtBlock",
        [
            Branch(
                _convnext_residual,
                last_layer="layer_scale",
                drop_path="stochastic_depth",
                layers=_layers("block"),
                gives_new_tensor=True,
            )
        ],
    ),
    "torchvision.models.efficientnet.MBConv": _mbconv("MBConv", lambda block: block.block[-1][1]),
    "torchvision.models.efficientnet.FusedMBConv": _mbconv("FusedMBConv", lambda block: block.block[-1][1]),
    "torchvision.models.mobilenetv2.InvertedResidual": BlockType(
        "MobileNetV2InvertedResidual",
        [Branch(lambda block, x: block.conv(x), last_layer=lambda block: block.conv[-1], layers=_layers("conv"))],
        is_residual=_uses_res_connect,
    ),
    "torchvision.models.mobilenetv3.InvertedResidual": BlockType(
        "MobileNetV3InvertedResidual",
        [Branch(lambda block, x: block.block(x), last_layer=lambda block: block.block[-1][1], layers=_layers("block"))],
        is_residual=_uses_res_connect,
    ),
    "torchvision.models.mnasnet._InvertedResidual": BlockType(
        "MNASNetInvertedResidual",
        [Branch(lambda block, x: block.layers(x), last_layer="layers.7", layers=_layers("layers"))],
        is_residual=lambda block: block.apply_residual,
    ),
    "torchvision.models.vision_transformer.EncoderBlock": BlockType(
        "ViTEncoderBlock",
        [
            Branch(_vit_attention, last_layer="self_attention.out_proj", layers=_layers("ln_1", "self_attention")),
            Branch(lambda block, x: block.mlp(block.ln_2(x)), last_layer="mlp.3", layers=_layers("ln_2", "mlp")),
        ],
    ),
    "torchvision.models.swin_transformer.SwinTransformerBlock": _swin(
        "SwinTransformerBlock",
        lambda block, x: block.stochastic_depth(block.attn(block.norm1(x))),
        lambda block, x: block.stochastic_depth(block.mlp(block.norm2(x))),
        last_layers=("attn.proj", "mlp.3"),
    ),
    "torchvision.models.swin_transformer.SwinTransformerBlockV2": _swin(
        "SwinTransformerBlockV2",
        lambda block, x: block.stochastic_depth(block.norm1(block.attn(x))),
        lambda block, x: block.stochastic_depth(block.norm2(block.mlp(x))),
        last_layers=("norm1", "norm2"),
    ),
    "torchvision.models.maxvit.MBConv": BlockType(
        "MaxViTMBConv",
        [
            Branch(
                lambda block, x: block.stochastic_depth(block.layers(x)),
                lambda block, x: block.proj(x),
                projects=lambda block: type(block.proj) is not nn.Identity,
                last_layer="layers.conv_c",
                drop_path="stochastic_depth",
                layers=_layers("layers"),
            )
        ],
    ),
    "torchvision.models.maxvit.PartitionAttentionLayer": BlockType(
        "MaxViTPartitionAttention",
        [
            Branch(
                lambda block, x: block.stochastic_dropout(block.attn_layer(x)),
                before=_maxvit_partition,
                last_layer="attn_layer.1.merge",
                drop_path="stochastic_dropout",
                layers=_layers("attn_layer"),
            ),
            Branch(
                lambda block, x: block.stochastic_dropout(block.mlp_layer(x)),
                after_sum=_maxvit_departition,
                last_layer="mlp_layer.3",
                drop_path="stochastic_dropout",
                layers=_layers("mlp_layer"),
            ),
        ],
    ),
}
