"""CutMix against torchvision's, and the distribution of its boxes."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import etude.functional as cf
from etude import Event, Trainer
from etude.algorithms import CutMix
from etude.engine.generator import step_generator
from helpers.battery import make_trainer
from helpers.networks import LinearModel, vectors
from helpers.recording import At


@pytest.mark.parametrize("seed", range(5))
def test_it_mixes_as_torchvision_with_the_same_box(seed: int) -> None:
    images, labels = torch.randn(5, 3, 9, 12), torch.tensor([0, 2, 1, 1, 0])
    theirs = v2.CutMix(alpha=1.0, num_classes=3)
    torch.manual_seed(seed)
    params = theirs.make_params([images])
    theirs.make_params = lambda _: params
    expected_images, expected_labels = theirs(images, labels)
    indices = torch.arange(5).roll(1)
    mixed, partners, area, box = cf.cutmix_batch(images, labels, bbox=params["box"], indices=indices)
    assert torch.equal(mixed, expected_images)
    assert area == pytest.approx(params["lam_adjusted"], abs=1e-12)
    assert box == params["box"]
    soft = area * F.one_hot(labels, 3) + (1 - area) * F.one_hot(partners, 3)
    torch.testing.assert_close(soft, expected_labels, rtol=0, atol=1e-7)


class Fixed:
    """A generator that gives these numbers."""

    def __init__(self, kept: float, left: int, top: int) -> None:
        self.kept, self.centres = kept, [left, top]

    def beta(self, a: float, b: float) -> float:
        return self.kept

    def integers(self, low: int, high: int, endpoint: bool) -> int:
        return self.centres.pop(0)

    def permutation(self, count: int) -> Any:
        return np.arange(count)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.37, 0.8, 0.99])
def test_boxes_are_torchvisions_for_the_same_random_numbers(kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.randn(2, 3, 11, 14), torch.tensor([0, 1])
    theirs = v2.CutMix(num_classes=3)
    monkeypatch.setattr(theirs, "_dist", type("Dist", (), {"sample": lambda self, shape: kept})())
    for left, top in [(0, 0), (5, 3), (13, 10)]:
        centres = iter([torch.tensor([left]), torch.tensor([top])])
        monkeypatch.setattr(torch, "randint", lambda *_, centres=centres, **__: next(centres))
        params = theirs.make_params([images])
        monkeypatch.undo()
        monkeypatch.setattr(theirs, "_dist", type("Dist", (), {"sample": lambda self, shape: kept})())
        _, _, area, box = cf.cutmix_batch(images, labels, generator=Fixed(kept, left, top))  # type: ignore[arg-type]
        assert box == params["box"]
        assert area == pytest.approx(params["lam_adjusted"], abs=1e-12)


def how_often_in_the_box(uniform: bool) -> np.ndarray[Any, Any]:
    """For each pixel of a row how often it is in the box of many draws."""
    images, labels = torch.zeros(1, 1, 8, 8), torch.zeros(1)
    counts = np.zeros(8)
    for step in range(6000):
        generator = step_generator(0, step, stream=2)
        _, _, _, (left, _, right, _) = cf.cutmix_batch(
            images, labels, length=0.5, uniform_sampling=uniform, generator=generator
        )
        counts[left:right] += 1
    return counts / 6000


def test_with_uniform_sampling_every_pixel_is_in_the_box_equally_often() -> None:
    uniform, paper = how_often_in_the_box(True), how_often_in_the_box(False)
    expected = 4 / 11  # 4 of the 11 intervals of length 4 that overlap with 8 pixels
    assert np.abs(uniform - expected).max() < 5 * np.sqrt(expected * (1 - expected) / 6000)
    assert paper[0] < 0.42 < 0.46 < paper[4]  # 3 and 4 of 8 centres


def test_length_gives_a_box_of_that_side() -> None:
    images, labels = torch.zeros(2, 1, 100, 40), torch.zeros(2)
    for step in range(20):
        generator = step_generator(0, step, stream=2)
        _, _, area, (left, top, right, bottom) = cf.cutmix_batch(images, labels, length=0.2, generator=generator)
        assert right - left <= 8 and bottom - top <= 20
        assert area >= 1 - 0.2**2 - 1e-9
    assert cf.cutmix_batch(images, labels, bbox=(4, 10, 12, 30))[2] == pytest.approx(1 - 0.2**2)


def test_the_batch_itself_is_not_changed() -> None:
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    before = images.clone()
    cf.cutmix_batch(images, labels, bbox=(0, 0, 8, 8))
    assert torch.equal(images, before)


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, batch: Any) -> Tensor:
        return self.conv(batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


def segment(algorithm: CutMix) -> Any:
    rows = [(torch.full((3, 6, 6), float(row)), torch.full((6, 6), row)) for row in range(4)]
    seen = At(Event.BEFORE_LOSS, lambda state: state.batch)
    Trainer(
        Segmenter(), DataLoader(rows, 4), max_duration="3ba", algorithms=algorithm, callbacks=seen, progress_bar=False
    ).fit()
    return seen.answers


def test_the_box_of_masks_is_replaced_with_that_of_the_images() -> None:
    batches = segment(CutMix())
    assert len(batches) == 3
    for images, masks in batches:
        assert masks.dtype == torch.int64
        assert torch.equal(images[:, 0], masks.float())
    assert any((masks != masks[:, :1, :1]).any() for _, masks in batches)


def test_losses_of_masks_cannot_be_interpolated() -> None:
    with pytest.raises(ValueError, match="CutMix must have interpolate_loss=False for targets of every pixel"):
        segment(CutMix(interpolate_loss=True))


def test_an_interpolated_loss_is_that_of_mixed_targets() -> None:
    def losses(interpolate: bool) -> Tensor:
        seen = At(Event.BEFORE_BACKWARD, lambda state: state.loss.detach())
        algorithm = CutMix(interpolate_loss=interpolate)
        trainer = make_trainer(algorithm, callbacks=seen, device_train_microbatch_size=2)
        trainer.fit()
        trainer.close()
        return torch.stack(seen.answers)

    torch.testing.assert_close(losses(True), losses(False), rtol=0, atol=1e-6)


def test_batches_without_images_are_refused() -> None:
    trainer = Trainer(
        LinearModel(), vectors(), max_duration="1ba", algorithms=CutMix(), device="cpu", progress_bar=False
    )
    with pytest.raises(ValueError, match=r"input must be images \(N, C, H, W\) to be mixed, got shape \(4, 8\)"):
        trainer.fit()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, "alpha must be a finite number > 0, got -1.0"),
        ({"interpolate_loss": "yes"}, TypeError, "interpolate_loss must be True or False, got 'yes'"),
        ({"uniform_sampling": None}, TypeError, "uniform_sampling must be True or False, got None"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CutMix(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0.0}, r"length must be a number in \(0, 1\], got 0.0"),
        ({"length": 0.5, "bbox": (0, 0, 1, 1)}, "one of length and bbox must be None"),
        ({"bbox": (0, 0, 9, 4)}, r"bbox must be \(left, top, right, bottom\) within an image of height 4 and width 8"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cf.cutmix_batch(torch.zeros(2, 3, 4, 8), torch.zeros(2), **arguments)
