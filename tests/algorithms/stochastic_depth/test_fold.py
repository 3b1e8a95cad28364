"""`cf.fold_stochastic_depth`: the folded network equals the converted one in evaluation."""

import copy

import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import Bottleneck

import etude.functional as cf
from etude.models import composer_resnet
from helpers.networks import tiny_resnet


def test_a_folded_network_is_torchvisions_own_and_its_weights_load_there() -> None:
    model = composer_resnet("resnet18", num_classes=3, zero_init_residual=False)
    cf.apply_stochastic_depth(model, drop_rate=0.5).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model((x, None))
    assert cf.fold_stochastic_depth(model) is model
    plain = resnet18(num_classes=3).eval()
    plain.load_state_dict(model.module.state_dict())
    assert torch.allclose(plain(x), before, atol=1e-5)


def test_only_the_last_normalisations_change() -> None:
    model = tiny_resnet()
    plain = copy.deepcopy(model.state_dict())
    cf.apply_stochastic_depth(model, drop_rate=0.4)
    rates = [block.drop_rate for block in cf.stochastic_blocks(model)]
    cf.fold_stochastic_depth(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, plain[name])}
    assert changed == {f"module.{2 + number}.bn3.weight" for number in range(4)}  # their biases are 0
    for number, rate in enumerate(rates):
        name = f"module.{2 + number}.bn3.weight"
        assert torch.allclose(model.state_dict()[name], (1 - rate) * plain[name])


def test_with_scaling_in_training_there_is_nothing_to_fold_in() -> None:
    model = tiny_resnet()
    plain = copy.deepcopy(model.state_dict())
    cf.fold_stochastic_depth(cf.apply_stochastic_depth(model, drop_rate=0.4, scaling="training"))
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


def test_a_factor_of_one_needs_no_layer_to_fold_into() -> None:
    model = timm.create_model("seresnet18")
    cf.fold_stochastic_depth(cf.apply_stochastic_depth(model, drop_rate=0.5, scaling="training"))
    assert not cf.stochastic_blocks(model)


def without_weights() -> nn.Module:
    blocks = [Bottleneck(16, 4), Bottleneck(16, 4)]
    blocks[1].bn3 = nn.BatchNorm2d(16, affine=False)
    return nn.Sequential(*blocks)


def with_shared_weights() -> nn.Module:
    blocks = [Bottleneck(16, 4), Bottleneck(16, 4)]
    blocks[1].bn3 = blocks[0].bn3
    return nn.Sequential(*blocks)


def with_shared_parameter() -> nn.Module:
    blocks = [Bottleneck(16, 4), Bottleneck(16, 4)]
    blocks[1].bn3.weight = blocks[0].bn3.weight
    return nn.Sequential(*blocks)


def with_parametrized_weight() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    nn.utils.parametrizations.weight_norm(layer.linear2)
    return nn.Sequential(layer)


class WithAdapter(nn.Linear):
    """A linear layer with a low-rank term, as LoRA has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.mean()


def with_subclass() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    layer.linear2 = WithAdapter(16, 8)
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_weights, r"with weights to fold into, model\.1 \(Bottleneck\) does not"),
        (
            lambda: timm.create_model("seresnet18"),
            r"with weights to fold into, model\.layer1\.0 \(BasicBlock\) does not",
        ),
        (with_parametrized_weight, r"model\.0 \(TransformerEncoderLayer\) ends in a ParametrizedLinear"),
        (
            with_subclass,
            r"model\.0 \(TransformerEncoderLayer\) ends in a WithAdapter, which may compute something else",
        ),
        (with_shared_weights, "must not share its weights"),
        (with_shared_parameter, "must not share its weights"),
    ],
)
def test_blocks_that_cannot_be_folded_are_refused_and_unchanged(make: object, message: str) -> None:
    model = cf.apply_stochastic_depth(make(), drop_rate=0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        cf.fold_stochastic_depth(model)
    assert cf.stochastic_blocks(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have stochastic depth to fold, Linear has none"):
        cf.fold_stochastic_depth(nn.Linear(2, 2))
