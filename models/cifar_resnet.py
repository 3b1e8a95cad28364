"""The small ResNets of He et al. 2015, section 4.2, for 32x32 images."""

import torch.nn.functional as F
from torch import Tensor, nn

from .classifier import ComposerClassifier


def cifar_resnet(depth: int, num_classes: int = 10) -> ComposerClassifier:
    """Build a CIFAR ResNet (He et al. 2015, section 4.2, arXiv:1512.03385).

    Three stages of 16, 32 and 64 channels with ``(depth - 2) / 6`` blocks each and parameter-free
    shortcuts (option A). The paper trains depths 20, 32, 44, 56, 110 and 1202.

    Args:
        depth: Number of layers with weights, ``6n + 2`` with n >= 1.
        num_classes: Number of classes.

    Returns:
        A classifier for batches ``(X, y)`` with images ``X`` of shape ``(N, 3, H, W)``.

    Raises:
        ValueError: If `depth` is not of this form.
    """
    return ComposerClassifier(CIFARResNet(blocks_per_stage(depth), num_classes), num_classes)


def blocks_per_stage(depth: int) -> int:
    """The n of a depth ``6n + 2``.

    Raises:
        ValueError: If `depth` is not ``6n + 2`` with n >= 1.
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 6n + 2 (20, 32, 44, 56, 110, 1202), got {depth!r}")
    return (depth - 2) // 6


class CIFARResNet(nn.Module):
    """The network: a 3x3 convolution, three stages, average pooling, one linear layer.

    Args:
        blocks_per_stage: The n of ``6n + 2``.
        num_classes: Number of logits.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks_per_stage)
        self.layer2 = _stage(16, 32, blocks_per_stage)
        self.layer3 = _stage(32, 64, blocks_per_stage)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


class CIFARBasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, at least `in_channels`.
        stride: Of the first convolution; the shortcut subsamples by it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.option_a_shortcut(x)
        return self.relu(out)

    def option_a_shortcut(self, x: Tensor) -> Tensor:
        """The input, subsampled and padded with zero channels where the block changes the shape."""
        if self.stride == 1 and self.new_channels == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def _stage(in_channels: int, out_channels: int, num_blocks: int) -> nn.Sequential:
    stride = 1 if in_channels == out_channels else 2
    first = CIFARBasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(CIFARBasicBlock(out_channels, out_channels) for _ in range(num_blocks - 1)))


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
