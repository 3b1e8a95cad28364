"""BlurPool: filters against Zhang (2019), surgery and state_dict."""

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import convolve
from torch import Tensor, nn
from torchvision.models import resnet18

import etude.functional as cf
from etude import Trainer
from etude.algorithms import BlurPool, StochasticDepth
from etude.algorithms.blurpool import BlurConv2d, BlurMaxPool2d, blur_2d
from etude.trainer import CheckpointSaver, load_weights
from helpers.battery import make_model, make_trainer
from helpers.networks import LinearModel, images
from helpers.resumable import differences

FILTER = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16


def blurred(images: Tensor, stride: int = 1) -> Tensor:
    """Each channel by itself, by scipy."""
    planes = [[convolve(plane, FILTER.numpy(), mode="constant") for plane in image] for image in images.numpy()]
    return torch.from_numpy(np.array(planes))[..., ::stride, ::stride]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(7, 8), (1, 2)])
def test_the_filter_is_that_of_the_paper(stride: int, size: tuple[int, int]) -> None:
    images = torch.randn(2, 5, *size)
    torch.testing.assert_close(blur_2d(images, stride), blurred(images, stride), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("blur_first", [True, False])
def test_a_convolution_blurs_its_input_or_its_output(kernel: int, blur_first: bool) -> None:
    conv = nn.Conv2d(4, 6, kernel, stride=2, padding=kernel // 2, groups=2)
    plain = copy.deepcopy(conv)
    BlurConv2d.convert(conv, blur_first)
    images = torch.randn(2, 4, 9, 12)
    if blur_first:
        expected = plain(blurred(images))
    else:
        plain.stride = (1, 1)
        expected = blurred(plain(images).detach(), stride=2)
    found = conv(images)
    assert found.shape == copy.deepcopy(plain)(images)[..., ::2, ::2].shape or blur_first
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_max_pooling_blurs_the_maxima_of_all_pixels() -> None:
    pool, images = nn.MaxPool2d(3, stride=2, padding=1), torch.randn(2, 4, 9, 12)
    shape = pool(images).shape
    BlurMaxPool2d.convert(pool)
    expected = blurred(F.max_pool2d(images, 3, stride=1, padding=1), stride=2)
    torch.testing.assert_close(pool(images), expected, rtol=0, atol=1e-6)
    assert pool(images).shape == shape


def test_a_shift_changes_less() -> None:
    """The share of what a shift of the image by one pixel changes after a strided layer."""
    torch.manual_seed(1)
    images = blur_2d(torch.randn(4, 16, 33, 33))
    plain, filtered = nn.MaxPool2d(2), nn.MaxPool2d(2)
    BlurMaxPool2d.convert(filtered)

    def change(pool: nn.Module) -> float:
        first, shifted = pool(images[..., :-1]), pool(images[..., 1:])
        return float((first - shifted)[..., 1:-1].std() / first.std())

    assert change(filtered) < 0.8 * change(plain)


def test_a_resnet_keeps_its_objects_and_parameters() -> None:
    model = resnet18()
    modules, parameters, keys = list(model.modules()), list(model.parameters()), list(model.state_dict())
    assert cf.apply_blurpool(model) is model
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    converted = [name for name, module in model.named_modules() if isinstance(module, (BlurConv2d, BlurMaxPool2d))]
    strided = [f"layer{number}.0.{name}" for number in (2, 3, 4) for name in ("conv1", "downsample.0")]
    assert converted == ["maxpool", *strided]  # not conv1, which has 3 input channels
    assert {*model.state_dict()} == {*keys, *(f"{name}.blur_filter" for name in converted)}
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


def test_copies_and_pickles_are_blurred_too(tmp_path: Path) -> None:
    model, images = make_model().eval(), torch.randn(2, 3, 8, 8)
    plain = copy.deepcopy(model)
    cf.apply_blurpool(model, min_channels=4)
    expected = model((images, None))
    assert not torch.allclose(expected, plain((images, None)))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other((images, None)), expected)


def test_weights_of_a_plain_network_load_and_those_of_a_blurred_one_do_not_load_into_it(tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, "1ep")
    trainer = make_trainer(BlurPool(min_channels=4), callbacks=saver)
    plain, images = make_model(), torch.randn(2, 3, 8, 8)
    trainer.state.model.load_state_dict(plain.state_dict())
    trainer.fit()
    expected = trainer.state.model.eval()((images, None))
    weights = load_weights(tmp_path)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blur_filter"):
        plain.load_state_dict(weights)
    other = cf.apply_blurpool(make_model(), min_channels=4).eval()
    other.load_state_dict(weights)
    assert torch.equal(other((images, None)), expected)
    for settings in ({"train": True, "load_weights_only": True}, {"train": False}):
        with pytest.raises(ValueError, match="blur_filter"):
            start(tmp_path, **settings)
    trainer.close()


def start(path: Path, train: bool, **settings: Any) -> Trainer:
    """A Trainer of a plain model that loads a checkpoint."""
    data = {"train_dataloader": images(), "max_duration": "1ep"} if train else {"eval_dataloader": images()}
    return Trainer(make_model(), load_path=path, device="cpu", progress_bar=False, **data, **settings)


@pytest.mark.parametrize("blur_first", [True, False])
def test_with_stochastic_depth_the_order_does_not_matter(blur_first: bool) -> None:
    results = []
    for order in (1, -1):
        depth = StochasticDepth(drop_rate=0.5, draws="balanced")
        trainer = make_trainer([depth, BlurPool(blur_first=blur_first, min_channels=4)][::order])
        trainer.fit()
        results.append(dict(trainer.state.model.state_dict()))
        folded = cf.fold_stochastic_depth(copy.deepcopy(trainer.state.model)).eval()
        images = torch.randn(2, 3, 8, 8)
        expected = trainer.state.model.eval()((images, None))
        torch.testing.assert_close(folded((images, None)), expected, rtol=1e-5, atol=1e-5)
        trainer.close()
    assert differences(*results) == []


def test_a_branch_that_ends_in_a_blurred_convolution_folds() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.shortcut = nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 16, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.shortcut(x) + self.conv(x)

    cf.register_residual_block(
        Block,
        residual=lambda block, x: block.conv(x),
        shortcut=lambda block, x: block.shortcut(x),
        last_layer="conv",
    )
    model = cf.apply_stochastic_depth(cf.apply_blurpool(nn.Sequential(Block())), drop_rate=0.5).eval()
    images = torch.randn(2, 16, 8, 8)
    expected = model(images)
    torch.testing.assert_close(cf.fold_stochastic_depth(model)(images), expected, rtol=1e-5, atol=1e-6)


def test_a_blurred_network_is_exported() -> None:
    model, images = cf.apply_blurpool(make_model().module, min_channels=4).eval(), torch.randn(2, 3, 8, 8)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images))


class OwnConv(nn.Conv2d):
    pass


def test_layers_that_cannot_be_converted_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3, 2),
        OwnConv(16, 16, 3, 2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(16, 16, 3),
    )
    with caplog.at_level(logging.WARNING):
        cf.apply_blurpool(model)
    assert [isinstance(module, (BlurConv2d, BlurMaxPool2d)) for module in model] == [True, *[False] * 4]
    assert "BlurPool leaves 2 strided layers alone" in caplog.text
    assert "1, 2" in caplog.text


def test_other_paddings_need_the_filter_first() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="model must have strided layers to convert, Sequential has none; these are"):
        cf.apply_blurpool(model, blur_first=False)
    plain, images = copy.deepcopy(model), torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(cf.apply_blurpool(model)(images), plain(blur_2d(images)))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"replace_convs": 1}, TypeError, "replace_convs must be True or False, got 1"),
        ({"min_channels": 0}, ValueError, "min_channels must be an int >= 1, got 0"),
        ({"replace_convs": False, "replace_maxpools": False}, ValueError, "one of replace_convs and replace_maxpools"),
        ({"replace_convs": False, "blur_first": False}, ValueError, "must not be given with replace_convs=False"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BlurPool(**settings)
    with pytest.raises(error, match=message):
        cf.apply_blurpool(make_model(), **settings)


def test_a_model_without_strided_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have strided layers to convert, LinearModel has none"):
        cf.apply_blurpool(LinearModel())
