"""ChannelsLast: memory format of weights, inputs and activations."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import etude.functional as cf
from etude import Trainer
from etude.algorithms import ChannelsLast
from helpers.battery import make_model, make_trainer
from helpers.networks import LinearModel, tiny_resnet, vectors
from helpers.parallel_training import refused
from helpers.ranks import on_ranks


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def formats(model: nn.Module, inputs: Tensor) -> list[bool]:
    """Whether the outputs of the convolutions are channels-last, where the two formats differ."""
    found: list[bool] = []

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        if not output.is_contiguous() or not is_channels_last(output):
            found.append(is_channels_last(output))

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, nn.Conv2d)]
    model((inputs, None))
    for hook in hooks:
        hook.remove()
    return found


def test_weights_and_activations_change_their_format_and_nothing_else() -> None:
    model = tiny_resnet()
    inputs = torch.randn(2, 3, 8, 8)
    assert not any(formats(model, inputs))
    plain, parameters = copy.deepcopy(model), list(model.parameters())
    assert cf.apply_channels_last(model) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(is_channels_last(p) for p in parameters if p.dim() == 4)
    for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    found = formats(model, inputs)
    assert found and all(found)
    torch.testing.assert_close(model((inputs, None)), plain((inputs, None)), rtol=1e-4, atol=1e-5)


def test_a_training_keeps_the_format_and_its_optimizer() -> None:
    model = make_model()
    parameters = list(model.parameters())
    trainer = make_trainer(ChannelsLast(), model)
    trainer.fit()
    (optimizer,) = trainer.state.optimizers
    assert all(p is q for p, q in zip(parameters, optimizer.param_groups[0]["params"], strict=True))
    assert all(is_channels_last(p) for p in model.parameters() if p.dim() == 4)
    plain = make_trainer([])
    plain.fit()
    for p, q in zip(model.parameters(), plain.state.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    trainer.close()
    plain.close()


def test_convolutions_of_three_dimensions_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv3d(2, 3, 2), nn.Conv2d(3, 4, 2))
    cf.apply_channels_last(model)
    assert model[0].weight.is_contiguous()
    assert is_channels_last(model[1].weight)


def test_a_model_without_convolutions_is_refused() -> None:
    model = LinearModel()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match="model must have weights of four dimensions, as of Conv2d, LinearModel has no"
    ):
        Trainer(model, vectors(), None, "1ep", ChannelsLast(), optimizer, device="cpu", progress_bar=False)


@on_ranks(2)
def test_shards_are_refused() -> None:
    with refused("parallelism='fsdp' shards contiguous parameters only, but the strides of module.0.weight are"):
        make_trainer(ChannelsLast(), parallelism="fsdp")
