"""ActivationCheckpointing: same results, less memory, recomputed forwards."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import etude.functional as cf
from etude import Trainer
from etude.algorithms import ActivationCheckpointing, StochasticDepth
from helpers.networks import images, tiny_resnet
from helpers.resumable import differences


class Plain(nn.Module):
    """Blocks with what a repeated forward could change: BatchNorm, dropout, and a buffer that the forward reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.Sequential(*(self._block() for _ in range(2)))

    def _block(self) -> nn.Module:
        linear = spectral_norm(nn.Linear(6, 6))  # its power iteration goes one step further in each forward
        return nn.Sequential(linear, nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(6, momentum=None))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def is_block(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and not isinstance(module[0], nn.Sequential)


def step(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Outputs, gradients and buffers of a training step."""
    torch.manual_seed(2)
    outputs = model(x)
    outputs.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"outputs": outputs.detach(), "gradients": gradients, "state": dict(model.state_dict())}


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of what a forward keeps for the backward pass, without parameters and the input."""
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor is not x:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    return sum(storages.values())


def test_outputs_gradients_and_buffers_are_those_of_the_plain_model() -> None:
    x = torch.randn(8, 6)
    plain = Plain()
    checkpointed = cf.apply_activation_checkpointing(Plain(), is_block)
    for _ in range(3):
        assert differences(step(plain, x), step(checkpointed, x)) == []
    plain.eval()
    checkpointed.eval()
    assert differences(step(plain, x), step(checkpointed, x)) == []


def test_a_backward_pass_may_be_repeated() -> None:
    x = torch.randn(8, 6)
    gradients = []
    for model in (Plain(), cf.apply_activation_checkpointing(Plain(), is_block)):
        torch.manual_seed(2)
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert differences(*gradients) == []


def test_less_is_kept_for_the_backward_pass() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = tiny_resnet()
    whole = kept_bytes(model.module, x)
    assert kept_bytes(cf.apply_activation_checkpointing(model).module, x) < whole / 3


@pytest.mark.parametrize("convert_first", [True, False])
def test_dropped_blocks_are_not_computed_again(convert_first: bool) -> None:
    model = tiny_resnet(num_blocks=4)
    if convert_first:
        cf.apply_stochastic_depth(model, drop_rate=0.5, drop_distribution="uniform")
        cf.apply_activation_checkpointing(model)
    else:
        cf.apply_activation_checkpointing(model)
        cf.apply_stochastic_depth(model, drop_rate=0.5, drop_distribution="uniform")
    blocks = cf.stochastic_blocks(model)
    calls = [0] * len(blocks)
    for number, block in enumerate(blocks):
        block.conv3.register_forward_hook(_counter(calls, number))
    num_dropped = 0
    for batch in images(num_samples=24):
        calls[:] = [0] * len(blocks)
        model.loss(model(batch), batch).backward()
        dropped = blocks[0].drop_plan.dropped_blocks
        assert calls == [0 if is_dropped else 2 for is_dropped in dropped]
        num_dropped += sum(dropped)
    assert 0 < num_dropped < 24


def _counter(calls: list[int], number: int) -> Callable[..., None]:
    def count(*_: Any) -> None:
        calls[number] += 1

    return count


@pytest.mark.parametrize("settings", [{}, {"device_train_microbatch_size": 2}, {"precision": "amp_bf16"}], ids=str)
@pytest.mark.parametrize("method", ["block", "sample"])
def test_a_training_with_stochastic_depth_is_unchanged(method: Any, settings: dict[str, Any]) -> None:
    results = []
    for extra in ([], [ActivationCheckpointing()]):
        torch.manual_seed(3)
        model = tiny_resnet()
        depth = StochasticDepth(drop_rate=0.5, stochastic_method=method)
        trainer = Trainer(model, images(), None, "1ep", [*extra, depth], device="cpu", **settings)
        trainer.fit()
        results.append(dict(model.state_dict()))
    assert differences(*results) == []


def test_copies_and_pickles_are_checkpointed_by_themselves() -> None:
    model = cf.apply_activation_checkpointing(tiny_resnet())
    batch = next(iter(images()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        checkpointed = [module for module in other.modules() if "forward" in vars(module)]
        assert [vars(module)["forward"].args[0] for module in checkpointed] == checkpointed
        assert len(checkpointed) == 4
        other.loss(other(batch), batch).backward()
        assert all(parameter.grad is None for parameter in model.parameters())


def test_it_can_be_removed() -> None:
    model = tiny_resnet()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    cf.apply_activation_checkpointing(model)
    assert list(model.state_dict()) == keys
    cf.remove_activation_checkpointing(model)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_nothing_is_checkpointed_without_gradients() -> None:
    model = cf.apply_activation_checkpointing(Plain().eval(), is_block)
    with torch.no_grad():
        outputs = model(torch.randn(8, 6))
    assert outputs.grad_fn is None


def test_bad_input_is_refused() -> None:
    with pytest.raises(TypeError, match="checkpoint_fn must be a function of a module, got 'Bottleneck'"):
        ActivationCheckpointing("Bottleneck")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checkpoint_fn must select a module of Plain, it selects none"):
        cf.apply_activation_checkpointing(Plain(), lambda module: False)
    with pytest.raises(ValueError, match=r"model must contain residual blocks of a known type, .* Plain contains none"):
        cf.apply_activation_checkpointing(Plain())
    with pytest.raises(ValueError, match="model must have activation checkpointing to remove it, Plain has none"):
        cf.remove_activation_checkpointing(Plain())
    model = cf.apply_activation_checkpointing(Plain(), is_block)
    with pytest.raises(ValueError, match=r"must not have activation checkpointing already .*, got it in 'blocks\.0'"):
        cf.apply_activation_checkpointing(model, is_block)
