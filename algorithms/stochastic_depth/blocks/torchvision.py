"""torchvision: ResNet, ResNeXt, Wide ResNet, ViT."""

from typing import Any

from torch import Tensor, nn

from .branch import BlockType, Branch


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


def _vit_attention(block: Any, x: Tensor) -> Tensor:
    x = block.ln_1(x)
    return block.dropout(block.self_attention(x, x, x, need_weights=False)[0])


BLOCK_TYPES = {
    "torchvision.models.resnet.BasicBlock": BlockType(
        "ResNetBasicBlock",
        (
            Branch(
                basic_residual,
                projection,
                relu,
                input_is_final=ends_in_relu,
                ends_in_relu=ends_in_relu,
                last_layer=lambda block: block.bn2,
                gives_new_tensor=True,
                layers=all_but_projection,
            ),
        ),
        has_projection,
    ),
    "torchvision.models.resnet.Bottleneck": BlockType(
        "ResNetBottleneck",
        (
            Branch(
                _bottleneck_residual,
                projection,
                relu,
                input_is_final=ends_in_relu,
                ends_in_relu=ends_in_relu,
                last_layer=lambda block: block.bn3,
                gives_new_tensor=True,
                layers=all_but_projection,
            ),
        ),
        has_projection,
    ),
    "torchvision.models.vision_transformer.EncoderBlock": BlockType(
        "ViTEncoderBlock",
        (
            Branch(
                _vit_attention,
                last_layer=lambda block: block.self_attention.out_proj,
                layers=lambda block: [block.ln_1, block.self_attention],
            ),
            Branch(
                lambda block, x: block.mlp(block.ln_2(x)),
                last_layer=lambda block: block.mlp[3],
                layers=lambda block: [block.ln_2, block.mlp],
            ),
        ),
    ),
}
