"""Conversion of a model and its removal."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import etude.functional as cf
from etude.algorithms.stochastic_depth.surgery import stochastic_blocks
from etude.models import composer_resnet
from helpers.networks import images, one_of_each_resnet, tiny_resnet


def test_surgery_keeps_modules_parameters_and_state_dict() -> None:
    model = tiny_resnet()
    modules, parameters = list(model.modules()), list(model.parameters())
    state = copy.deepcopy(model.state_dict())
    assert cf.apply_stochastic_depth(model) is model
    assert all(now is before for now, before in zip(model.modules(), modules, strict=True))
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


def test_remove_undoes_the_surgery() -> None:
    model = tiny_resnet()
    plain = copy.deepcopy(model)
    cf.apply_stochastic_depth(model, drop_rate=0.9)
    assert cf.remove_stochastic_depth(model) is model
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [vars(module).keys() for module in model.modules()] == [vars(module).keys() for module in plain.modules()]
    assert not model._forward_pre_hooks
    batch = next(iter(images()))
    assert torch.equal(model(batch), plain(batch))
    cf.apply_stochastic_depth(model)  # and it can be done again


@pytest.mark.parametrize(("name", "num_blocks"), [("resnet50", 16), ("resnet101", 33), ("resnet152", 50)])
def test_every_block_of_the_zoo_is_converted_with_the_linear_rates(name: str, num_blocks: int) -> None:
    with torch.device("meta"):
        model = composer_resnet(name, num_classes=10)
    cf.apply_stochastic_depth(model, "ResNetBottleneck", "block", 0.2, "linear")
    rates = [block.drop_rate for block in stochastic_blocks(model)]
    assert rates == [0.2 * (block / num_blocks) for block in range(1, num_blocks + 1)]


def test_every_training_forward_draws_a_new_plan_and_evaluation_none() -> None:
    model = cf.apply_stochastic_depth(tiny_resnet(8), drop_rate=0.5, drop_distribution="uniform")
    plan = stochastic_blocks(model)[0].drop_plan
    batch = next(iter(images()))
    patterns = []
    for _ in range(20):
        model(batch)
        patterns.append(tuple(plan.dropped_blocks))
    assert len(set(patterns)) > 10
    model.eval()(batch)
    assert tuple(plan.dropped_blocks) == patterns[-1]


def test_equal_seeds_drop_equally_and_others_do_not() -> None:
    def patterns(seed: int) -> list[list[bool] | None]:
        model = cf.apply_stochastic_depth(tiny_resnet(8), drop_rate=0.5, drop_distribution="uniform", seed=seed)
        plan, found = stochastic_blocks(model)[0].drop_plan, []
        for _ in range(5):
            model(batch)
            found.append(plan.dropped_blocks)
        return found

    batch = next(iter(images()))
    assert patterns(3) == patterns(3)
    assert patterns(3) != patterns(4)


def test_shared_blocks_are_counted_once() -> None:
    block = Bottleneck(16, 4)
    model = cf.apply_stochastic_depth(nn.Sequential(block, Bottleneck(16, 4), block), drop_rate=0.5)
    assert [block.drop_rate for block in stochastic_blocks(model)] == [0.25, 0.5]


class _OwnForward(Bottleneck):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stochastic_method": "layer"}, ValueError, "stochastic_method must be 'block' or 'sample', got 'layer'"),
        ({"stochastic_method": ""}, ValueError, "stochastic_method must be 'block' or 'sample', got ''"),
        ({"drop_distribution": "cosine"}, ValueError, "drop_distribution must be one of .*'linear'.* got 'cosine'"),
        ({"drop_rate": 1.2}, ValueError, r"drop_rate must be a number in \[0, 1\], got 1.2"),
        ({"drop_rate": float("nan")}, ValueError, r"drop_rate must be a number in \[0, 1\], got nan"),
        ({"drop_rate": "high"}, TypeError, r"drop_rate must be a number in \[0, 1\], got 'high'"),
        (
            {"target_layer_name": "Wheel"},
            ValueError,
            "model must contain blocks of type Wheel, Comp",
        ),
        ({"use_same_gpu_seed": "no"}, TypeError, "use_same_gpu_seed must be True or False, got 'no'"),
        ({"protect_projections": 1}, TypeError, "protect_projections must be True or False, got 1"),
        ({"seed": "a"}, TypeError, "seed must be an int, got 'a'"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got 1.5"),
        ({"draws": "fair"}, ValueError, "draws must be 'independent' or 'balanced', got 'fair'"),
        ({"scaling": "never"}, ValueError, "scaling must be 'evaluation' or 'training', got 'never'"),
        ({"drop_unit": "layer"}, ValueError, "drop_unit must be 'block' or 'branch', got 'layer'"),
        ({"target_layer_name": ""}, ValueError, "target_layer_name must be the name of .* got ''"),
    ],
)
def test_bad_arguments_are_refused_and_leave_the_model_alone(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    model = tiny_resnet()
    with pytest.raises(error, match=message):
        cf.apply_stochastic_depth(model, **arguments)
    assert not stochastic_blocks(model)
    assert not model._forward_pre_hooks


def test_a_model_without_a_matching_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"residual blocks of a known type, .* Linear contains none"):
        cf.apply_stochastic_depth(nn.Linear(3, 3))
    with pytest.raises(
        ValueError, match="model must contain blocks of type ResNetBottleneck, Sequential contains none"
    ):
        cf.apply_stochastic_depth(nn.Sequential(BasicBlock(4, 4)), target_layer_name="ResNetBottleneck")


def test_a_subclass_with_its_own_forward_is_refused_by_name() -> None:
    model = nn.Sequential(Bottleneck(16, 4), _OwnForward(16, 4))
    with pytest.raises(ValueError, match=r"model\.1 is a _OwnForward, a subclass of Bottleneck"):
        cf.apply_stochastic_depth(model)
    assert not stochastic_blocks(model)


def test_a_second_surgery_is_refused() -> None:
    model = cf.apply_stochastic_depth(tiny_resnet(), drop_rate=0.3)
    with pytest.raises(ValueError, match="model has stochastic depth already"):
        cf.apply_stochastic_depth(model, drop_rate=0.4)
    assert stochastic_blocks(model)[-1].drop_rate == 0.3


def test_remove_from_a_plain_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have stochastic depth to remove it, ResNet has none"):
        cf.remove_stochastic_depth(one_of_each_resnet())
