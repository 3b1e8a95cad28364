"""A small network for each registered block type, with normalization layers at random values."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from etude.models import cifar_resnet
from helpers.networks import tiny_resnet


def _resnet(block: type[nn.Module], **options: int) -> nn.Module:
    """Two stages of a torchvision ResNet, so that there are both kinds of shortcut."""
    network = ResNet(block, [2, 2, 1, 1], num_classes=3, **options)
    return nn.Sequential(network.conv1, network.bn1, nn.ReLU(), network.layer1, network.layer2)


def _timm(name: str) -> nn.Module:
    import timm

    network = timm.create_model(name, num_classes=3)
    return nn.Sequential(network.conv1, network.bn1, network.act1, network.layer1, network.layer2)


class Encoder(nn.Module):
    """A linear layer and a transformer encoder, for inputs ``(N, L, 12)`` or ``(L, N, 12)``."""

    def __init__(self, norm_first: bool, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, norm_first=norm_first, batch_first=batch_first)
        self.embed = nn.Linear(12, 12)
        self.layers = nn.ModuleList(
            [layer, nn.TransformerEncoderLayer(12, 2, 24, 0.0, norm_first=norm_first, batch_first=batch_first)]
        )

    def forward(self, x: Tensor, **masks: object) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, **masks)
        return x


IMAGE = (4, 3, 16, 16)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet Bottleneck": (lambda: tiny_resnet().module, IMAGE),
    "ResNet BasicBlock": (lambda: _resnet(BasicBlock), IMAGE),
    "ResNeXt": (lambda: _resnet(Bottleneck, groups=4, width_per_group=4), IMAGE),
    "Wide ResNet": (lambda: _resnet(Bottleneck, width_per_group=32), IMAGE),
    "CIFAR ResNet": (lambda: cifar_resnet(14).module, IMAGE),
    "timm BasicBlock": (lambda: _timm("resnet18"), IMAGE),
    "timm Bottleneck": (lambda: _timm("resnet26"), IMAGE),
    "ViT": (lambda: VisionTransformer(16, 8, 2, 2, 12, 24, num_classes=3), IMAGE),
    "pre-norm encoder": (lambda: Encoder(norm_first=True, batch_first=True), (4, 5, 12)),
    "post-norm encoder": (lambda: Encoder(norm_first=False, batch_first=True), (4, 5, 12)),
    "sequence-first encoder": (lambda: Encoder(norm_first=True, batch_first=False), (5, 4, 12)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network in double precision, and an input of four samples."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network = make().double()
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    if hasattr(network, "heads"):
        nn.init.normal_(network.heads.head.weight)
    return network, torch.randn(shape, dtype=torch.float64)
