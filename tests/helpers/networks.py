"""Small networks and data."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.models import ResNet
from torchvision.models.resnet import Bottleneck

from etude.models import ComposerClassifier


def tiny_resnet(num_blocks: int = 4, num_classes: int = 3, stride: int = 1) -> ComposerClassifier:
    """A torchvision Bottleneck chain of few channels: one projection block, then identity shortcuts."""
    downsample = nn.Sequential(nn.Conv2d(4, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
    blocks = [Bottleneck(4, 4, stride, downsample=downsample), *(Bottleneck(16, 4) for _ in range(num_blocks - 1))]
    return ComposerClassifier(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, num_classes),
        ),
        num_classes,
    )


def one_of_each_resnet(num_classes: int = 3) -> ResNet:
    """A real torchvision ResNet with one Bottleneck per stage."""
    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=num_classes)


class LinearModel(nn.Module):
    """A linear classifier that is a model by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.linear(batch[0])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


def vectors(num_samples: int = 24, batch_size: int = 4, shuffle: bool = False) -> DataLoader:
    """Batches of vectors ``(N, 8)`` and classes 0..2."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_samples, 8, generator=generator)
    targets = torch.randint(0, 3, (num_samples,), generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size, shuffle=shuffle)


def images(num_samples: int = 16, batch_size: int = 4, shuffle: bool = False, size: int = 8) -> DataLoader:
    """Batches of images ``(N, 3, size, size)`` and classes 0..2."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_samples, 3, size, size, generator=generator)
    targets = torch.randint(0, 3, (num_samples,), generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size, shuffle=shuffle)


class Stream(IterableDataset):
    """Rows without a length, anew in every epoch."""

    def __init__(self, num_rows: int = 12) -> None:
        self.num_rows = num_rows

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        generator = torch.Generator().manual_seed(1)
        for row in torch.randn(self.num_rows, 8, generator=generator):
            yield row, 1


def linear_model(seed: int = 0) -> LinearModel:
    torch.manual_seed(seed)
    return LinearModel()


def classifier() -> ComposerClassifier:
    torch.manual_seed(0)
    return ComposerClassifier(nn.Linear(8, 3), num_classes=3)


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()
