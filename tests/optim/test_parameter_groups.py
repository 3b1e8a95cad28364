"""Parameter groups with and without weight decay."""

import math
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from torch import nn
from torch.optim import SGD

from etude.models import ComposerClassifier, composer_resnet
from etude.optim import parameter_groups


def names_without_decay(model: nn.Module, groups: list[dict[str, Any]]) -> set[str]:
    plain = {id(parameter) for group in groups if group["weight_decay"] == 0 for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in plain}


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_the_groups_are_those_of_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    excluded: Any = getattr(model, "no_weight_decay", tuple)()
    expected = param_groups_weight_decay(model, 0.05, no_weight_decay_list=excluded)
    assert names_without_decay(model, parameter_groups(model, weight_decay=0.05)) == names_without_decay(
        model, expected
    )


def test_the_names_that_a_model_excludes_are_found_inside_of_a_wrapper() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    wrapped = ComposerClassifier(model, num_classes=1000)
    names = names_without_decay(wrapped, parameter_groups(wrapped, weight_decay=0.05))
    assert {"module.pos_embed", "module.cls_token"} <= names


def test_every_trainable_parameter_is_in_one_group() -> None:
    model = composer_resnet("resnet18", num_classes=10)
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_normalization_over_several_dimensions_and_shared_parameters() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.LayerNorm((2, 3)), shared)
    groups = parameter_groups(model, weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [1, 3]
    assert names_without_decay(model, groups) == {"0.bias", "1.weight", "1.bias"}


def test_a_step_without_gradient_signal_shrinks_only_the_decayed_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    SGD(parameter_groups(model, weight_decay=0.5), lr=0.1).step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name == "0.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_a_group_without_parameters_is_left_out() -> None:
    assert [group["weight_decay"] for group in parameter_groups(nn.BatchNorm1d(3), weight_decay=0.1)] == [0.0]
    assert [group["weight_decay"] for group in parameter_groups(nn.Linear(3, 3, bias=False), weight_decay=0.1)] == [0.1]


@pytest.mark.parametrize("weight_decay", [-0.1, math.nan, math.inf, True, None, "0.1"])
def test_a_bad_weight_decay_is_refused(weight_decay: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="weight_decay must be a finite number >= 0, got") as caught:
        parameter_groups(nn.Linear(3, 3), weight_decay=weight_decay)
    assert repr(weight_decay) in str(caught.value)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="must have trainable parameters, ReLU has none"):
        parameter_groups(nn.ReLU(), weight_decay=0.1)
