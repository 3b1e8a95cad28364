"""The CIFAR ResNets of `etude.models`."""

from .branch import BlockType, Branch
from .torchvision import all_but_projection, basic_residual, ends_in_relu, relu

BLOCK_TYPES = {
    "etude.models.cifar_resnet.CIFARBasicBlock": BlockType(
        "CIFARBasicBlock",
        [
            Branch(
                basic_residual,
                lambda block, x: block.option_a_shortcut(x),
                relu,
                projects=lambda block: block.stride != 1 or block.new_channels > 0,
                ends_in_relu=ends_in_relu,
                last_layer="bn2",
                layers=all_but_projection,
                gives_new_tensor=True,
            )
        ],
    ),
}
