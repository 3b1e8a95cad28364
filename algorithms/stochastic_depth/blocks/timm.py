"""timm: convolutional networks."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .branch import BlockType, Branch, get_attribute
from .torchvision import all_but_projection, ends_in_relu, has_projection, projection, relu

# ResNet


def _basic_residual(block: Any, x: Tensor) -> Tensor:
    x = block.aa(block.act1(block.drop_block(block.bn1(block.conv1(x)))))
    return _end_of_resnet(block, block.bn2(block.conv2(x)))


def _bottleneck_residual(block: Any, x: Tensor) -> Tensor:
    x = block.act1(block.bn1(block.conv1(x)))
    x = block.aa(block.act2(block.drop_block(block.bn2(block.conv2(x)))))
    return _end_of_resnet(block, block.bn3(block.conv3(x)))


def _end_of_resnet(block: Any, x: Tensor) -> Tensor:
    x = x if block.se is None else block.se(x)
    return x if block.drop_path is None else block.drop_path(x)


def _resnet(name: str, residual: Any, last_layer: str, activation: str) -> BlockType:
    branch = Branch(
        residual,
        projection,
        lambda block, y: getattr(block, activation)(y),
        projects=has_projection,
        ends_in_relu=lambda block: type(getattr(block, activation)) is nn.ReLU,
        last_layer=lambda block: get_attribute(block, last_layer) if block.se is None else None,
        drop_path="drop_path",
        layers=all_but_projection,
    )
    return BlockType(name, [branch])


# ResNeSt, whose own drop path is in front of the projection and stays; SKNet, SENet


def _resnest_residual(block: Any, x: Tensor) -> Tensor:
    x = block.act1(block.bn1(block.conv1(x)))
    x = x if block.avd_first is None else block.avd_first(x)
    x = block.act2(block.drop_block(block.bn2(block.conv2(x))))
    x = x if block.avd_last is None else block.avd_last(x)
    return block.bn3(block.conv3(x))


def _resnest_projection(block: Any, x: Tensor) -> Tensor:
    if block.downsample is None:
        return x
    return block.downsample(x if block.drop_path is None else block.drop_path(x))


def _sknet_residual(block: Any, x: Tensor) -> Tensor:
    return _end_of_resnet(block, block.conv3(block.conv2(block.conv1(x))))


def _sknet_basic_residual(block: Any, x: Tensor) -> Tensor:
    return _end_of_resnet(block, block.conv2(block.conv1(x)))


def _senet_residual(block: Any, x: Tensor) -> Tensor:
    x = block.relu(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x))))))
    return block.se_module(block.bn3(block.conv3(x)))


def _senet_basic_residual(block: Any, x: Tensor) -> Tensor:
    x = block.relu(block.bn1(block.conv1(x)))
    return block.se_module(block.relu(block.bn2(block.conv2(x))))


def _senet(name: str, residual: Any) -> BlockType:
    branch = Branch(
        residual, projection, relu, projects=has_projection, ends_in_relu=ends_in_relu, layers=all_but_projection
    )
    return BlockType(name, [branch])


# ResNetV2, NormFree: with a projection, the pre-activation serves both sides


def _preact_residual(block: Any, x: Tensor) -> Tensor:
    x = block.conv2(block.norm2(block.conv1(x)))
    return block.drop_path(block.conv3(block.norm3(x)))


def _preact_basic_residual(block: Any, x: Tensor) -> Tensor:
    return block.drop_path(block.conv2(block.norm2(block.conv1(x))))


def _preact(residual: Any, last_layer: str) -> Any:
    with_projection = Branch(
        residual,
        lambda block, h: block.downsample(h),
        before=lambda block, x: block.norm1(x),
        layers=lambda block: [one for name, one in block.named_children() if name not in ("norm1", "downsample")],
        last_layer=last_layer,
        drop_path="drop_path",
    )
    plain = Branch(
        lambda block, x: residual(block, block.norm1(x)),
        layers=all_but_projection,
        last_layer=last_layer,
        drop_path="drop_path",
    )
    return lambda block: [plain if block.downsample is None else with_projection]


def _v2_residual(block: Any, x: Tensor) -> Tensor:
    x = block.norm2(block.conv2(block.norm1(block.conv1(x))))
    return block.drop_path(block.norm3(block.conv3(x)))


def _before_norm_free(block: Any, x: Tensor) -> Tensor:
    return block.act1(x) * block.beta


def _norm_free_residual(block: Any, x: Tensor) -> Tensor:
    x = block.conv2(block.act2(block.conv1(x)))
    x = x if block.conv2b is None else block.conv2b(block.act2b(x))
    x = x if block.attn is None else block.attn_gain * block.attn(x)
    x = block.conv3(block.act3(x))
    x = x if block.attn_last is None else block.attn_gain * block.attn_last(x)
    x = block.drop_path(x)
    return (x if block.skipinit_gain is None else x * block.skipinit_gain) * block.alpha


def _last_of_norm_free(block: Any) -> nn.Module | nn.Parameter | None:
    if block.skipinit_gain is not None:
        return block.skipinit_gain
    return block.conv3 if block.attn_last is None else None


def _norm_free(block: Any) -> Sequence[Branch]:
    return [_NORM_FREE if block.downsample is None else _NORM_FREE_PROJECTION]


_NORM_FREE = Branch(
    lambda block, x: _norm_free_residual(block, _before_norm_free(block, x)),
    last_layer=_last_of_norm_free,
    drop_path="drop_path",
)
_NORM_FREE_PROJECTION = Branch(
    _norm_free_residual,
    lambda block, h: block.downsample(h),
    before=_before_norm_free,
    last_layer=_last_of_norm_free,
    drop_path="drop_path",
)

# RegNet, ConvNeXt


def _regnet_residual(block: Any, x: Tensor) -> Tensor:
    return block.drop_path(block.conv3(block.se(block.conv2(block.conv1(x)))))


def _convnext_residual(block: Any, x: Tensor) -> Tensor:
    x = block.conv_dw(x)
    if block.use_conv_mlp:
        x = block.mlp(block.norm(x))
    else:
        x = block.mlp(block.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    return block.drop_path(x if block.gamma is None else x.mul(block.gamma.reshape(1, -1, 1, 1)))


# EfficientNet, MobileNet and their relatives


def _chain(*names: str) -> Any:
    """A residual branch that calls these layers one after the other, without those that the block does not have."""

    def residual(block: Any, x: Tensor) -> Tensor:
        for name in names:
            layer = getattr(block, name, None)
            x = x if layer is None else layer(x)
        return block.drop_path(x)

    return residual


def _efficientnet(name: str, *names: str, last_layer: Any = None) -> BlockType:
    branch = Branch(_chain(*names), last_layer=last_layer or names[-1], drop_path="drop_path")
    return BlockType(name, [branch], is_residual=lambda block: block.has_skip)


def _is_skipped(block: Any) -> bool:
    return block.downsample is not None


BLOCK_TYPES = {
    "timm.models.resnet.BasicBlock": _resnet("TimmBasicBlock", _basic_residual, "bn2", "act2"),
    "timm.models.resnet.Bottleneck": _resnet("TimmBottleneck", _bottleneck_residual, "bn3", "act3"),
    "timm.models.resnest.ResNestBottleneck": BlockType(
        "TimmResNestBottleneck",
        [
            Branch(
                _resnest_residual,
                _resnest_projection,
                lambda block, y: block.act3(y),
                projects=has_projection,
                ends_in_relu=lambda block: type(block.act3) is nn.ReLU,
                last_layer="bn3",
                layers=all_but_projection,
            )
        ],
    ),
    "timm.models.sknet.SelectiveKernelBottleneck": _resnet("TimmSKBottleneck", _sknet_residual, "conv3.bn", "act"),
    "timm.models.sknet.SelectiveKernelBasic": _resnet("TimmSKBasic", _sknet_basic_residual, "conv2.bn", "act"),
    "timm.models.senet.SEBottleneck": _senet("TimmSEBottleneck", _senet_residual),
    "timm.models.senet.SEResNetBottleneck": _senet("TimmSEResNetBottleneck", _senet_residual),
    "timm.models.senet.SEResNeXtBottleneck": _senet("TimmSEResNeXtBottleneck", _senet_residual),
    "timm.models.senet.SEResNetBlock": _senet("TimmSEResNetBlock", _senet_basic_residual),
    "timm.models.resnetv2.PreActBottleneck": BlockType("TimmPreActBottleneck", _preact(_preact_residual, "conv3")),
    "timm.models.resnetv2.PreActBasic": BlockType("TimmPreActBasic", _preact(_preact_basic_residual, "conv2")),
    "timm.models.resnetv2.Bottleneck": BlockType(
        "TimmResNetV2Bottleneck",
        [
            Branch(
                _v2_residual,
                projection,
                lambda block, y: block.act3(y),
                projects=has_projection,
                ends_in_relu=lambda block: type(block.act3) is nn.ReLU,
                last_layer="norm3",
                drop_path="drop_path",
                layers=all_but_projection,
            )
        ],
    ),
    "timm.models.nfnet.NormFreeBlock": BlockType("TimmNormFreeBlock", _norm_free),
    "timm.models.regnet.Bottleneck": BlockType(
        "TimmRegNetBottleneck",
        [
            Branch(
                _regnet_residual,
                projection,
                lambda block, y: block.act3(y),
                projects=lambda block: type(block.downsample) is not nn.Identity,
                ends_in_relu=lambda block: type(block.act3) is nn.ReLU,
                last_layer="conv3.bn",
                drop_path="drop_path",
                layers=all_but_projection,
            )
        ],
        is_residual=_is_skipped,
    ),
    "timm.models.convnext.ConvNeXtBlock": BlockType(
        "TimmConvNeXtBlock",
        [
            Branch(
                _convnext_residual,
                lambda block, x: block.shortcut(x),
                projects=lambda block: type(block.shortcut) is not nn.Identity,
                last_layer=lambda block: block.mlp.fc2 if block.gamma is None else block.gamma,
                drop_path="drop_path",
            )
        ],
    ),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": _efficientnet(
        "TimmDepthwiseSeparableConv", "conv_s2d", "bn_s2d", "conv_dw", "bn1", "aa", "se", "conv_pw", "bn2"
    ),
    "timm.models._efficientnet_blocks.InvertedResidual": _efficientnet(
        "TimmInvertedResidual",
        *("conv_s2d", "bn_s2d", "conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl", "bn3"),
    ),
    "timm.models._efficientnet_blocks.EdgeResidual": _efficientnet(
        "TimmEdgeResidual", "conv_exp", "bn1", "aa", "se", "conv_pwl", "bn2"
    ),
    "timm.models._efficientnet_blocks.ConvBnAct": _efficientnet("TimmConvBnAct", "conv", "bn1", "aa", last_layer="bn1"),
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": _efficientnet(
        "TimmUniversalInvertedResidual",
        *("dw_start", "pw_exp", "dw_mid", "se", "pw_proj", "dw_end", "layer_scale"),
        last_layer=lambda block: block.layer_scale if hasattr(block.layer_scale, "gamma") else block.pw_proj.bn,
    ),
}
