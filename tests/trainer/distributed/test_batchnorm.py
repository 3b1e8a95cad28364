"""Synchronized BatchNorm in one process."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from etude import Trainer
from etude.algorithms import StochasticDepth
from etude.trainer.distributed.batchnorm import CPUSyncBatchNorm
from helpers.networks import LinearModel, images, tiny_resnet, vectors


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pair(**settings: object) -> tuple[nn.BatchNorm2d, CPUSyncBatchNorm]:
    """torch's BatchNorm and ours with the same weights."""
    torch.manual_seed(0)
    plain, synchronised = nn.BatchNorm2d(3, **settings), CPUSyncBatchNorm(3, **settings)
    for parameter in plain.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    synchronised.load_state_dict(plain.state_dict())
    return plain, synchronised


def outputs_and_gradients(layer: nn.Module, input: Tensor) -> list[Tensor]:
    input = input.clone().requires_grad_()
    output = layer(input)
    probe = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    (output * probe).sum().backward()
    assert input.grad is not None
    return [output.detach(), input.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "settings", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}], ids=str
)
def test_it_is_batchnorm(settings: dict[str, object], group_of_one: None) -> None:
    plain, synchronised = (layer.double() for layer in pair(**settings))
    for _ in range(3):
        rows = torch.randn(5, 3, 2, 4, dtype=torch.float64) * 2 + 100
        pairs = list(zip(outputs_and_gradients(plain, rows), outputs_and_gradients(synchronised, rows), strict=True))
        assert len(pairs) == 2 + len(list(plain.parameters()))
        for expected, found in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert list(plain.state_dict()) == list(synchronised.state_dict())
    torch.testing.assert_close(dict(synchronised.state_dict()), dict(plain.state_dict()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(synchronised.eval()(rows), plain.eval()(rows), rtol=1e-9, atol=1e-9)


def test_large_means_keep_their_digits(group_of_one: None) -> None:
    _, synchronised = pair(affine=False)
    output = synchronised(torch.randn(64, 3, 4, 4) + 1e4)
    assert output.std(dim=(0, 2, 3)).sub(1).abs().max() < 1e-2


def test_formats_stay(group_of_one: None) -> None:
    plain, synchronised = pair()
    rows = torch.randn(8, 3, 4, 4).to(memory_format=torch.channels_last)
    assert synchronised(rows).is_contiguous(memory_format=torch.channels_last)
    low = rows.bfloat16()
    assert synchronised(low).dtype is torch.bfloat16
    torch.testing.assert_close(synchronised(low), plain(low), rtol=2e-2, atol=2e-2)
    assert synchronised.running_mean.dtype is torch.float32


def test_one_value_per_channel_is_refused(group_of_one: None) -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        CPUSyncBatchNorm(3)(torch.ones(1, 3, 1, 1))


def test_one_process_sees_all_rows_as_it_is() -> None:
    models = []
    for sync_batchnorm in (False, True):
        torch.manual_seed(0)
        model, depth = tiny_resnet(), StochasticDepth(drop_rate=0.5)
        Trainer(model, images(), None, "3ba", depth, progress_bar=False, sync_batchnorm=sync_batchnorm).fit()
        models.append(model)
    plain, synchronised = (model.state_dict() for model in models)
    assert [type(module) for module in models[0].modules()] == [type(module) for module in models[1].modules()]
    assert all(torch.equal(plain[name], synchronised[name]) for name in plain)


class ScaledBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_bad_input() -> None:
    def refuse(model: nn.Module, message: str, *algorithms: StochasticDepth) -> None:
        before = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=message):
            Trainer(model, images(), None, "1ba", algorithms, progress_bar=False, sync_batchnorm=True)
        assert algorithms or [type(module) for module in model.modules()] == before

    with pytest.raises(ValueError, match="needs a model with BatchNorm to have an effect"):
        Trainer(LinearModel(), vectors(), None, "1ba", progress_bar=False, sync_batchnorm=True)
    model = tiny_resnet()
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).__class__ = ScaledBatchNorm
    refuse(model, "not what a subclass adds; got ScaledBatchNorm at model.module.2.bn1")
    refuse(tiny_resnet(), "all ranks to compute the same layers", StochasticDepth(stochastic_method="sample"))
    refuse(tiny_resnet(), "all ranks to compute the same layers", StochasticDepth(use_same_gpu_seed=False))
