"""ResNets for CIFAR."""

import pytest
import torch
from torch import nn

from etude.models import CIFARBasicBlock, cifar_resnet


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)]
)
def test_the_networks_have_the_papers_size(depth: int, millions: float) -> None:
    """He et al. 2015, table 6."""
    with torch.device("meta"):
        model = cifar_resnet(depth)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert parameters == pytest.approx(millions, abs=0.05 if depth > 56 else 0.006)


def test_it_maps_images_to_logits_and_learns() -> None:
    model = cifar_resnet(8, num_classes=4)
    batch = torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
    outputs = model(batch)
    assert outputs.shape == (2, 4)
    model.loss(outputs, batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_shortcuts_have_no_parameters_and_pad_with_zero_channels() -> None:
    block = CIFARBasicBlock(3, 5, stride=2)
    x = torch.randn(2, 3, 8, 8)
    shortcut = block.option_a_shortcut(x)
    assert torch.equal(shortcut[:, :3], x[:, :, ::2, ::2])
    assert torch.equal(shortcut[:, 3:], torch.zeros(2, 2, 4, 4))
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"conv1", "bn1", "conv2", "bn2"}
    same = CIFARBasicBlock(3, 3)
    assert same.option_a_shortcut(x) is x


@pytest.mark.parametrize("depth", [0, 2, 21, 56.0, "20", True])
def test_another_depth_is_refused(depth: object) -> None:
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2 .*, got"):
        cifar_resnet(depth)
