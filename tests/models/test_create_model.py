"""`create_model`."""

import pytest
import torch
from torch import nn

from etude.models import composer_resnet, create_model


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "timm:resnet10t", "cifar_resnet8"])
def test_every_source_of_networks_maps_images_to_logits(name: str) -> None:
    network = create_model(name, num_classes=5).eval()
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("name", ["resnet50", "timm:vit_small_patch16_224", "cifar_resnet110"])
def test_on_the_meta_device_a_network_has_no_data(name: str) -> None:
    with torch.device("meta"):
        network = create_model(name)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


def test_options_reach_the_constructor() -> None:
    plain, dropped = (create_model("timm:resnet10t", drop_path_rate=rate) for rate in (0.0, 0.2))
    assert "DropPath" not in repr(plain)
    assert "DropPath" in repr(dropped)
    with pytest.raises(TypeError, match="no_such_option"):
        create_model("resnet18", no_such_option=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet51"}, "timm:NAME or cifar_resnet20 to cifar_resnet1202, got 'resnet51'"),
        ({"name": "timm:resnet51"}, "model must be a network that timm has, got 'timm:resnet51'"),
        ({"name": "cifar_resnet21"}, r"depth must be 6n \+ 2"),
        ({"name": "cifar_resnet"}, "model must be cifar_resnet20 to cifar_resnet1202, got 'cifar_resnet'"),
        ({"name": "resnet18", "num_classes": 0}, "num_classes must be an int >= 1, got 0"),
        ({"name": "resnet18", "weights": "V9"}, "weights of resnet18 must be one of IMAGENET1K_V1, got 'V9'"),
        ({"name": "timm:vit_tiny_patch16_224", "weights": "v9"}, "must be one of augreg_in21k.*, got 'v9'"),
        ({"name": "cifar_resnet20", "weights": "DEFAULT"}, "weights of cifar_resnet20 must be None"),
    ],
)
def test_a_missing_checkpoint_is_refused_with_those_that_exist(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(**arguments)  # type: ignore[arg-type]


def test_composer_resnet_lists_the_weights_that_exist() -> None:
    with pytest.raises(ValueError, match="weights of resnet18 must be one of IMAGENET1K_V1, got 'IMAGENET1K_V2'"):
        composer_resnet("resnet18", weights="IMAGENET1K_V2")


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "convnext_tiny", "efficientnet_b0", "swin_t"])
def test_pretrained_weights_get_a_new_head_for_other_classes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import WeightsEnum

    def download(self: WeightsEnum, **_: object) -> object:
        with torch.device("cpu"):
            return create_model(name).state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", download)
    network = create_model(name, num_classes=7, weights="DEFAULT")
    assert [module for module in network.modules() if isinstance(module, nn.Linear)][-1].out_features == 7
