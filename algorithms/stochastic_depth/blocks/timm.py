"""timm: ResNet and its relatives."""

from typing import Any

from torch import Tensor, nn

from .branch import BlockType, Branch
from .torchvision import all_but_projection, has_projection, projection


def _timm_basic_residual(block: Any, x: Tensor) -> Tensor:
    x = block.aa(block.act1(block.drop_block(block.bn1(block.conv1(x)))))
    return _timm_ending(block, block.bn2(block.conv2(x)))


def _timm_bottleneck_residual(block: Any, x: Tensor) -> Tensor:
    x = block.act1(block.bn1(block.conv1(x)))
    x = block.aa(block.act2(block.drop_block(block.bn2(block.conv2(x)))))
    return _timm_ending(block, block.bn3(block.conv3(x)))


def _timm_ending(block: Any, x: Tensor) -> Tensor:
    x = x if block.se is None else block.se(x)
    return x if block.drop_path is None else block.drop_path(x)


BLOCK_TYPES = {
    "timm.models.resnet.BasicBlock": BlockType(
        "TimmBasicBlock",
        (
            Branch(
                _timm_basic_residual,
                projection,
                lambda block, y: block.act2(y),
                input_is_final=lambda block: type(block.act2) is nn.ReLU,
                ends_in_relu=lambda block: type(block.act2) is nn.ReLU,
                last_layer=lambda block: block.bn2 if block.se is None else None,
                layers=all_but_projection,
            ),
        ),
        has_projection,
    ),
    "timm.models.resnet.Bottleneck": BlockType(
        "TimmBottleneck",
        (
            Branch(
                _timm_bottleneck_residual,
                projection,
                lambda block, y: block.act3(y),
                input_is_final=lambda block: type(block.act3) is nn.ReLU,
                ends_in_relu=lambda block: type(block.act3) is nn.ReLU,
                last_layer=lambda block: block.bn3 if block.se is None else None,
                layers=all_but_projection,
            ),
        ),
        has_projection,
    ),
}
