"""ProgressiveResizing: schedule of sizes, pixels against `interpolate`."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import etude.functional as cf
from etude import Event, State, Trainer
from etude.algorithms import LabelSmoothing, MixUp, ProgressiveResizing
from etude.engine.generator import step_generator
from helpers.battery import make_model, make_trainer
from helpers.networks import LinearModel, Stream, images, tiny_resnet, vectors
from helpers.recording import At


def sizes_of(algorithm: ProgressiveResizing, num_steps: int = 10, size: int = 16) -> list[tuple[int, int]]:
    """Height and width of the images of each step."""
    seen = At(Event.BEFORE_FORWARD, lambda state: tuple(state.batch[0].shape[-2:]))
    data = images(num_samples=4 * num_steps, size=size)
    Trainer(
        tiny_resnet(), data, max_duration="1ep", algorithms=algorithm, callbacks=seen, device="cpu", progress_bar=False
    ).fit()
    return seen.answers


def test_the_sizes_follow_the_schedule() -> None:
    # Elapsed: 0, 0.1, ..., 0.9; the scale rises from 0.25 at 0.2 to 1 at 0.7.
    algorithm = ProgressiveResizing(initial_scale=0.25, delay_fraction=0.2, finetune_fraction=0.3, size_increment=1)
    scales = [0.25, 0.25, 0.25, 0.4, 0.55, 0.7, 0.85, 1, 1, 1]
    assert sizes_of(algorithm) == [(round(16 * scale),) * 2 for scale in scales]


@pytest.mark.parametrize(("increment", "expected"), [(4, [4, 4, 4, 8, 8, 12, 12, 16, 16, 16]), (32, [16] * 10)])
def test_sizes_are_multiples_of_the_increment(increment: int, expected: list[int]) -> None:
    algorithm = ProgressiveResizing(
        initial_scale=0.25, delay_fraction=0.2, finetune_fraction=0.3, size_increment=increment
    )
    assert sizes_of(algorithm) == [(size, size) for size in expected]


def test_images_are_whole_at_the_end_whatever_their_size() -> None:
    algorithm = ProgressiveResizing(delay_fraction=0.5, finetune_fraction=0.5, size_increment=4)
    assert sizes_of(algorithm, size=15) == [(8, 8)] * 5 + [(15, 15)] * 5


def test_without_a_delay_and_an_end_the_scale_rises_all_the_time() -> None:
    algorithm = ProgressiveResizing(delay_fraction=0.0, finetune_fraction=0.0, size_increment=1)
    assert [height for height, _ in sizes_of(algorithm)] == [8, 9, 10, 10, 11, 12, 13, 14, 14, 15]


def test_images_and_probabilities_are_interpolated_as_by_torch() -> None:
    inputs, masks = torch.rand(2, 3, 9, 12), torch.softmax(torch.randn(2, 5, 9, 12), 1)
    resized, targets = cf.resize_batch(inputs, masks, 0.5, resize_targets=True)
    assert resized.shape == (2, 3, 4, 6)
    for found, whole in ((resized, inputs), (targets, masks)):
        expected = F.interpolate(whole, size=(4, 6), mode="bilinear", antialias=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(targets.sum(1), torch.ones(2, 4, 6))
    assert cf.resize_batch(inputs, masks, 0.5)[1] is masks


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_classes_are_those_of_the_nearest_pixel(dtype: torch.dtype) -> None:
    inputs, masks = torch.rand(2, 3, 10, 13), torch.randint(0, 9, (2, 10, 13)).to(dtype)
    _, targets = cf.resize_batch(inputs, masks, 0.6, resize_targets=True)
    assert targets.dtype is dtype
    expected = F.interpolate(masks[:, None].double(), size=(6, 8), mode="nearest-exact")[:, 0]
    assert torch.equal(targets.double(), expected)


def test_crops_of_images_and_targets_are_of_the_same_place() -> None:
    inputs = torch.rand(2, 1, 10, 12)
    corners = set()
    for step in range(50):
        generator = step_generator(0, step, stream=3)
        cropped, targets = cf.resize_batch(inputs, inputs[:, 0], 0.5, "crop", True, generator=generator)
        assert torch.equal(cropped[:, 0], targets)
        (place,) = [
            (top, left)
            for top in range(6)
            for left in range(7)
            if torch.equal(cropped, inputs[..., top : top + 5, left : left + 6])
        ]
        corners.add(place)
    assert {top for top, _ in corners} == set(range(6))
    assert {left for _, left in corners} == set(range(7))


def test_targets_may_have_another_size() -> None:
    inputs = torch.rand(1, 1, 8, 8)
    masks = F.interpolate(inputs, scale_factor=2, mode="nearest")[:, 0]
    cropped, targets = cf.resize_batch(inputs, masks, 0.5, "crop", True, generator=step_generator(0, 1, stream=3))
    assert torch.equal(targets, F.interpolate(cropped, scale_factor=2, mode="nearest")[:, 0])


def test_unchanged_batches_are_not_copied() -> None:
    inputs, targets = torch.rand(2, 3, 8, 8), torch.zeros(2)
    assert all(a is b for a, b in zip(cf.resize_batch(inputs, targets, 1.0), (inputs, targets), strict=True))


def test_crops_depend_on_the_seed_and_the_step_only() -> None:
    def crops(seed: int, size: int | None = None) -> Tensor:
        seen = At(Event.BEFORE_TRAIN_BATCH, lambda state: state.batch[0])
        algorithm = ProgressiveResizing("crop", delay_fraction=0.8)
        trainer = make_trainer(algorithm, callbacks=seen, seed=seed, device_train_microbatch_size=size)
        trainer.fit()
        trainer.close()
        return torch.cat([batch for batch in seen.answers if batch.shape[-1] == 4])

    assert torch.equal(crops(1), crops(1, size=2))
    assert not torch.equal(crops(1), crops(2))


@pytest.mark.parametrize("order", [1, -1])
def test_resized_masks_are_mixed_and_smoothed_in_every_order(order: int) -> None:
    """The masks of the partners, too, have the size of the resized batch."""

    class Segmenter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 1)

        def forward(self, batch: Any) -> Tensor:
            return self.conv(batch[0])

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs, batch[1])

    seen = At(Event.BEFORE_LOSS, lambda state: state.batch[1].shape)
    rows = [(torch.randn(3, 8, 8), torch.randint(4, (8, 8))) for _ in range(4)]
    algorithms = [ProgressiveResizing(resize_targets=True, delay_fraction=0.8), MixUp(), LabelSmoothing()][::order]
    Trainer(
        Segmenter(), DataLoader(rows, 2), max_duration="1ep", algorithms=algorithms, callbacks=seen, progress_bar=False
    ).fit()
    assert seen.answers == [(2, 4, 4, 4)] * 2


def test_metrics_say_the_size() -> None:
    logged = At(Event.BATCH_END, lambda state: None)
    from etude.loggers import InMemoryLogger

    memory = InMemoryLogger()
    trainer = make_trainer(ProgressiveResizing(), callbacks=logged, loggers=memory)
    trainer.fit()
    trainer.close()
    rows = memory.get_timeseries("progressive_resizing/width")
    assert list(rows["progressive_resizing/width"]) == [4, 4, 4, 4, 8, 8]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mode": "zoom"}, ValueError, "mode must be 'resize' or 'crop', got 'zoom'"),
        ({"initial_scale": 1.0}, ValueError, r"initial_scale must be a number in \(0, 1\), got 1.0"),
        ({"delay_fraction": -0.1}, ValueError, r"delay_fraction must be a number in \[0, 1\], got -0.1"),
        ({"finetune_fraction": 0.6}, ValueError, "must add up to at most 1, got 0.5 and 0.6"),
        ({"size_increment": 0}, ValueError, "size_increment must be an int >= 1, got 0"),
        ({"resize_targets": 1}, TypeError, "resize_targets must be True or False, got 1"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ProgressiveResizing(**settings)


def test_data_without_a_length_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="needs a train_dataloader with a length"):
        Trainer(LinearModel(), DataLoader(Stream(), 4), max_duration="1ep", algorithms=ProgressiveResizing())


def test_a_batch_without_images_or_masks_is_refused() -> None:
    settings: Any = {"max_duration": "1ba", "device": "cpu", "progress_bar": False}
    with pytest.raises(ValueError, match=r"ProgressiveResizing needs images \(N, C, H, W\), got shape \(4, 8\)"):
        Trainer(LinearModel(), vectors(), algorithms=ProgressiveResizing(), **settings).fit()
    masks = ProgressiveResizing(resize_targets=True)
    with pytest.raises(ValueError, match=r"target must be of shape \(N, H, W\) or \(N, C, H, W\) to be resized, got"):
        make_trainer(masks, make_model()).fit()


def test_the_scale_is_a_function_of_the_state() -> None:
    algorithm = ProgressiveResizing()
    state = State(model=LinearModel(), max_duration=None)
    with pytest.raises(ValueError, match="needs a max_duration"):
        algorithm.scale(state)
    assert algorithm.depends_on_duration
