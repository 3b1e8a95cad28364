"""`composer_resnet`."""

import pytest
import torch
import torchvision

from etude.models import composer_resnet
from etude.models.resnet import RESNETS


@pytest.mark.parametrize("name", RESNETS)
def test_the_network_is_torchvisions_own(name: str) -> None:
    with torch.device("meta"):
        model = composer_resnet(name, num_classes=7)
        plain = getattr(torchvision.models, name)(num_classes=7)
    assert type(model.module) is type(plain)
    shapes = {key: value.shape for key, value in model.module.state_dict().items()}
    assert shapes == {key: value.shape for key, value in plain.state_dict().items()}


def test_it_maps_images_to_logits() -> None:
    model = composer_resnet("resnet18", num_classes=7)
    assert model([torch.randn(2, 3, 32, 32), torch.tensor([0, 1])]).shape == (2, 7)


def test_every_block_starts_as_the_identity() -> None:
    last = [
        block.bn2.weight
        for stage in ("layer1", "layer4")
        for block in getattr(composer_resnet("resnet18").module, stage)
    ]
    assert len(last) == 4
    assert all((weight == 0).all() for weight in last)
    plain = composer_resnet("resnet18", zero_init_residual=False).module
    assert (plain.layer1[0].bn2.weight == 1).all()


def test_pretrained_weights_are_loaded_and_the_last_layer_fits_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torchvision.models.resnet18()
    asked = []

    def fake_download(weights: object, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        asked.append(weights)
        return source.state_dict()

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fake_download)
    same = composer_resnet("resnet18", weights="IMAGENET1K_V1").module
    other = composer_resnet("resnet18", num_classes=7, weights="IMAGENET1K_V1").module
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1] * 2
    assert torch.equal(same.fc.weight, source.fc.weight)
    assert other.fc.out_features == 7
    assert torch.equal(other.conv1.weight, source.conv1.weight)


@pytest.mark.parametrize("name", ["resnet51", "", "ResNet50", None])
def test_an_unknown_name_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match=f"model_name must be one of resnet18, .*, got {name!r}"):
        composer_resnet(name)
