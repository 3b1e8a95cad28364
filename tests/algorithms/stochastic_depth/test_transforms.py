"""Converted networks with torch.jit.trace and torch.func."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock

import etude.functional as cf


def network(method: Any, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    blocks = [BasicBlock(4, 4, norm_layer=lambda width: nn.GroupNorm(2, width)) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), *blocks).double()
    return cf.apply_stochastic_depth(model, stochastic_method=method, drop_rate=0.5, **settings)


@pytest.mark.parametrize("method", ["block", "sample"])
def test_a_traced_resnet_evaluates_as_the_converted_one(method: Any) -> None:
    model = cf.apply_stochastic_depth(resnet18(num_classes=3), stochastic_method=method, drop_rate=0.5).eval()
    x = torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated
        traced = torch.jit.trace(model, x)
        assert torch.equal(traced(x), model(x))
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace must be given the model in evaluation mode"):
            torch.jit.trace(model.train(), x)


@pytest.mark.parametrize("scaling", ["evaluation", "training"])
@pytest.mark.parametrize("method", ["block", "sample"])
def test_the_gradients_of_torch_func_are_those_of_backward(method: Any, scaling: Any) -> None:
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    model, twin = network(method, scaling=scaling), network(method, scaling=scaling)
    for _ in range(4):  # as many plans
        twin.zero_grad()
        twin(x).square().mean().backward()

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            outputs: Tensor = torch.func.functional_call(model, parameters, (x,))
            return outputs.square().mean()

        gradients = torch.func.grad(loss)(dict(model.named_parameters()))
        for name, parameter in twin.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradients[name], expected, msg=name)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch itself uses it
def test_forward_mode_derivatives_are_those_of_backward() -> None:
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    direction = torch.randn_like(x)
    model, twin = network("sample"), network("sample")
    _, derivative = torch.func.jvp(lambda inputs: model(inputs).square().sum(), (x,), (direction,))
    (gradient,) = torch.autograd.grad(twin(x.requires_grad_()).square().sum(), x)
    torch.testing.assert_close(derivative, (gradient * direction).sum())
