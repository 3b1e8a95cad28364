"""MixUp against the formulas and torchvision's."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

import etude.functional as cf
from etude import Callback, Event, State, Trainer
from etude.algorithms import LabelSmoothing, MixUp
from etude.engine.generator import step_generator
from helpers.battery import make_trainer
from helpers.networks import LinearModel, tiny_resnet, vectors
from helpers.recording import At


def test_it_mixes_as_torchvision_with_the_same_lambda() -> None:
    images, labels = torch.randn(5, 3, 6, 7, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    theirs = v2.MixUp(alpha=0.4, num_classes=3)
    for lam in (0.9, 0.5, 1.0):
        theirs.make_params = lambda _, lam=lam: {"lam": lam}
        expected_images, expected_labels = theirs(images, labels)
        mixed, partners, mixing = cf.mixup_batch(images, labels, mixing=1 - lam, indices=torch.arange(5).roll(1))
        torch.testing.assert_close(mixed, expected_images, rtol=0, atol=1e-12)
        soft = (1 - mixing) * F.one_hot(labels, 3) + mixing * F.one_hot(partners, 3)
        torch.testing.assert_close(soft, expected_labels, rtol=0, atol=1e-7)


def test_the_weight_is_the_smaller_one_of_a_beta_distributed_pair() -> None:
    inputs, targets = torch.zeros(1, 1), torch.zeros(1)
    weights = [
        cf.mixup_batch(inputs, targets, alpha=0.3, generator=step_generator(1, i, stream=2))[2] for i in range(2000)
    ]
    betas = np.random.default_rng(3).beta(0.3, 0.3, 20000)
    assert min(weights) >= 0 and max(weights) <= 0.5
    assert kstest(weights, np.minimum(betas, 1 - betas)).pvalue > 0.01


def test_the_functional_form_follows_torchs_global_generator() -> None:
    def draw() -> tuple[Tensor, Tensor, float]:
        torch.manual_seed(4)
        return cf.mixup_batch(torch.arange(12.0).reshape(6, 2), torch.arange(6))

    first, second = draw(), draw()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and first[2] == second[2]
    torch.manual_seed(5)
    assert cf.mixup_batch(torch.zeros(6, 2), torch.arange(6))[2] != first[2]


class Watch(Callback):
    """Keeps what the model and the loss see in each microbatch."""

    def __init__(self) -> None:
        self.whole: list[tuple[Tensor, Tensor]] = []
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.losses: list[Tensor] = []

    def batch_start(self, state: State, logger: Any) -> None:
        self.whole.append(state.batch)

    def before_loss(self, state: State, logger: Any) -> None:
        self.seen.append(state.batch)

    def before_backward(self, state: State, logger: Any) -> None:
        assert state.loss is not None
        self.losses.append(state.loss.detach())


@pytest.mark.parametrize("size", [None, 3])
def test_rows_are_mixed_over_the_whole_batch_before_it_is_split(size: int | None) -> None:
    watch = Watch()
    settings = {"device_train_microbatch_size": size, "seed": 11}
    trainer = make_trainer(MixUp(0.8), callbacks=watch, **settings)
    trainer.fit()
    assert len(watch.seen) == 6 * (1 if size is None else 2)
    for step, (inputs, targets) in enumerate(watch.whole):
        generator = step_generator(11, step, stream=2)
        mixing = generator.beta(0.8, 0.8)
        mixing = min(mixing, 1 - mixing)
        partners = torch.from_numpy(generator.permutation(4))
        parts = watch.seen[step : step + 1] if size is None else watch.seen[2 * step : 2 * step + 2]
        found_inputs, found_targets = (torch.cat(part) for part in zip(*parts, strict=True))
        torch.testing.assert_close(found_inputs, (1 - mixing) * inputs + mixing * inputs[partners], rtol=0, atol=1e-6)
        one_hot = F.one_hot(targets, 3)
        torch.testing.assert_close(
            found_targets, (1 - mixing) * one_hot + mixing * one_hot[partners], rtol=0, atol=1e-7
        )
    trainer.close()


@pytest.mark.parametrize("algorithms", [[MixUp()], [LabelSmoothing(), MixUp()], [MixUp(), LabelSmoothing()]])
def test_metrics_of_training_see_the_original_targets(algorithms: list[Any]) -> None:
    """As a callback finds them after the loss of each microbatch."""
    found = At(Event.BEFORE_BACKWARD, lambda state: state.batch[1])
    whole = At(Event.BATCH_START, lambda state: state.batch[1])
    accuracy = MulticlassAccuracy(3)
    update = At(Event.AFTER_BACKWARD, lambda state: accuracy.update(state.outputs, state.batch[1]))
    trainer = make_trainer(algorithms, callbacks=[found, whole, update], device_train_microbatch_size=2)
    trainer.fit()
    assert torch.equal(torch.cat(found.answers), torch.cat(whole.answers))
    assert 0 < accuracy.compute() < 1
    trainer.close()


def losses_of(*algorithms: Any) -> Tensor:
    watch = Watch()
    trainer = make_trainer(list(algorithms), callbacks=watch, device_train_microbatch_size=2)
    trainer.fit()
    trainer.close()
    return torch.stack(watch.losses)


def test_an_interpolated_loss_is_that_of_mixed_targets() -> None:
    torch.testing.assert_close(losses_of(MixUp(interpolate_loss=True)), losses_of(MixUp()), rtol=0, atol=1e-6)


def test_mixed_targets_are_smoothed_in_either_order() -> None:
    smoothing = LabelSmoothing(0.3)
    first = losses_of(smoothing, MixUp())
    assert torch.equal(first, losses_of(MixUp(), smoothing))
    assert not torch.allclose(first, losses_of(MixUp()))


def test_each_rank_draws_for_itself() -> None:
    draws = [step_generator(0, 3, rank, stream=2).permutation(50) for rank in (0, 1)]
    assert not np.array_equal(*draws)


def test_targets_may_be_probabilities() -> None:
    inputs = torch.randn(8, 8)
    targets = torch.softmax(torch.randn(8, 3), 1)
    seen = At(Event.BEFORE_LOSS, lambda state: state.batch[1])
    data = DataLoader(TensorDataset(inputs, targets), 8)
    Trainer(LinearModel(), data, max_duration="1ba", algorithms=MixUp(), callbacks=seen, progress_bar=False).fit()
    generator = step_generator(0, 0, stream=2)
    mixing = generator.beta(0.2, 0.2)
    mixing = min(mixing, 1 - mixing)
    expected = (1 - mixing) * targets + mixing * targets[torch.from_numpy(generator.permutation(8))]
    torch.testing.assert_close(seen.answers[0], expected, rtol=0, atol=1e-7)


class Segmenter(nn.Module):
    """A class for every pixel of images in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.conv(batch["image"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, batch["mask"])


def test_it_mixes_masks_in_batches_of_any_form() -> None:
    rows = [{"image": torch.randn(3, 5, 5), "mask": torch.randint(4, (5, 5))} for _ in range(4)]
    seen = At(Event.BEFORE_LOSS, lambda state: state.batch)
    algorithm = MixUp(input_key="image", target_key="mask")
    data: DataLoader[Any] = DataLoader(rows, 4)
    Trainer(Segmenter(), data, max_duration="1ba", algorithms=algorithm, callbacks=seen, progress_bar=False).fit()
    (batch,) = seen.answers
    assert batch["mask"].shape == (4, 4, 5, 5)
    torch.testing.assert_close(batch["mask"].sum(1), torch.ones(4, 5, 5))


def test_no_global_generator_is_read() -> None:
    def state_after(algorithms: Any) -> Tensor:
        trainer = make_trainer(algorithms)
        trainer.fit()
        trainer.close()
        return torch.get_rng_state()

    assert torch.equal(state_after([]), state_after(MixUp()))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"alpha": 0}, ValueError, "alpha must be a finite number > 0, got 0"),
        ({"alpha": "x"}, TypeError, "alpha must be a finite number > 0, got 'x'"),
        ({"interpolate_loss": 1}, TypeError, "interpolate_loss must be True or False, got 1"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MixUp(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixing": 1.5}, r"mixing must be a number in \[0, 1\], got 1.5"),
        ({"input": torch.zeros(2, 3, dtype=torch.uint8)}, "input must be floating-point to be mixed, got torch.uint8"),
        ({"target": torch.zeros(3)}, r"must have the same number of rows to be mixed, got shapes \(2, 3\) and \(3,\)"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cf.mixup_batch(**{"input": torch.zeros(2, 3), "target": torch.zeros(2), **arguments})


def train_on(batch: Any, **settings: Any) -> None:
    class Model(LinearModel):
        def forward(self, batch: Any) -> Any:
            return self.linear(torch.ones(4, 8))

        def loss(self, outputs: Any, batch: Any) -> Tensor:
            return outputs.sum()

    Trainer(Model(), [batch], max_duration="1ba", algorithms=MixUp(**settings), device="cpu", progress_bar=False).fit()


@pytest.mark.parametrize(
    ("batch", "settings", "message"),
    [
        (torch.ones(4, 8), {}, "MixUp needs batches with a tensor at input_key=0, got nothing there in a Tensor"),
        ([torch.ones(4, 8)], {}, "MixUp needs batches with a tensor at target_key=1, got nothing there in a list of 1"),
        ({"x": torch.ones(4, 8)}, {"input_key": "x", "target_key": "y"}, "target_key='y', got nothing there in a dict"),
        ((torch.ones(4, 8), list("abcd")), {}, "MixUp needs batches with a tensor at target_key=1, got a list there"),
    ],
)
def test_a_batch_without_inputs_or_targets_is_refused(batch: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_on(batch, **settings)


def test_interpolated_losses_and_label_smoothing_are_refused_together() -> None:
    algorithms = [LabelSmoothing(), MixUp(interpolate_loss=True)]
    with pytest.raises(ValueError, match="MixUp must have interpolate_loss=False to be used with LabelSmoothing"):
        make_trainer(algorithms)


def test_a_loss_of_several_parts_cannot_be_interpolated() -> None:
    class Parts(LinearModel):
        def loss(self, outputs: Any, batch: Any) -> Any:
            return {"a": super().loss(outputs, batch), "b": outputs.sum()}

    algorithm = MixUp(interpolate_loss=True)
    trainer = Trainer(Parts(), vectors(), max_duration="1ba", algorithms=algorithm, device="cpu", progress_bar=False)
    with pytest.raises(
        ValueError, match="MixUp must have interpolate_loss=False for a loss of several parts, got a dict"
    ):
        trainer.fit()


def test_outputs_that_are_no_logits_are_refused() -> None:
    model = tiny_resnet()
    model.module = nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"logits must be of shape \(N, C, ...\), got \(4,\)"):
        make_trainer(MixUp(), model).fit()
