"""LabelSmoothing and `cf.smooth_labels`."""

import pytest
import torch
import torch.nn.functional as F

import etude.functional as cf
from etude import Event, State, Trainer
from etude.algorithms import LabelSmoothing
from helpers.networks import LinearModel, vectors
from helpers.recording import At


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
def test_the_loss_equals_torchs_own_label_smoothing(smoothing: float) -> None:
    logits, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    ours = F.cross_entropy(logits, cf.smooth_labels(logits, target, smoothing))
    assert torch.allclose(ours, F.cross_entropy(logits, target, label_smoothing=smoothing))


def test_smoothed_targets_are_probabilities_also_for_soft_targets() -> None:
    logits, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    once = cf.smooth_labels(logits, target, 0.2)
    twice = cf.smooth_labels(logits, once, 0.2)
    for soft in (once, twice):
        assert torch.allclose(soft.sum(1), torch.ones(6))
        assert (soft > 0).all()
    assert torch.equal(once.argmax(1), target)


def test_training_smooths_and_restores_the_targets_of_the_batch() -> None:
    def losses(state: State) -> tuple[float, float, bool]:
        _, targets = state.batch
        plain = F.cross_entropy(state.outputs, targets)
        smoothed = F.cross_entropy(state.outputs, targets, label_smoothing=0.3)
        return state.loss.item(), smoothed.item(), bool(plain != smoothed)

    watch = At(Event.BEFORE_BACKWARD, losses)
    Trainer(
        LinearModel(),
        vectors(),
        max_duration="1ep",
        algorithms=LabelSmoothing(0.3),
        callbacks=watch,
        progress_bar=False,
    ).fit()
    assert len(watch.answers) == 6
    for loss, smoothed, differs in watch.answers:
        assert loss == pytest.approx(smoothed)
        assert differs


def test_evaluation_is_not_smoothed() -> None:
    model = LinearModel()
    arguments = {"eval_dataloader": vectors(), "progress_bar": False}
    plain = Trainer(model, **arguments).eval()
    smoothed = Trainer(model, algorithms=LabelSmoothing(0.5), **arguments).eval()
    assert plain == smoothed


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_smoothing_out_of_range_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"smoothing must be a number in \[0, 1\], got"):
        LabelSmoothing(smoothing)
    with pytest.raises(ValueError, match=r"smoothing must be a number in \[0, 1\], got"):
        cf.smooth_labels(torch.randn(2, 3), torch.tensor([0, 1]), smoothing)


def test_smoothing_of_another_type_or_zero_is_refused() -> None:
    with pytest.raises(TypeError, match=r"smoothing must be a number in \[0, 1\], got 'much'"):
        LabelSmoothing("much")
    with pytest.raises(ValueError, match="smoothing must be above 0 to have an effect, got 0"):
        LabelSmoothing(0)


def test_targets_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target must be of shape \(4,\) or \(4, 3\) for these logits, got \(2,\)"):
        cf.smooth_labels(torch.randn(4, 3), torch.tensor([0, 1]))


def test_targets_of_every_pixel_are_smoothed_as_by_torch() -> None:
    logits, target = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 3, 4))
    soft = cf.smooth_labels(logits, target, 0.2)
    assert soft.shape == logits.shape
    expected = F.cross_entropy(logits, target, label_smoothing=0.2)
    torch.testing.assert_close(F.cross_entropy(logits, soft), expected, rtol=0, atol=1e-6)
    again = cf.smooth_labels(logits, soft, 0.2)
    torch.testing.assert_close(again, 0.8 * soft + 0.2 / 5)


def test_soft_targets_have_the_precision_of_the_loss() -> None:
    target = torch.tensor([0, 1])
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        assert cf.smooth_labels(torch.randn(2, 3, dtype=dtype), target).dtype is expected


@pytest.mark.parametrize("index", [-100, 255])
def test_an_ignored_class_is_refused(index: int) -> None:
    with pytest.raises(
        ValueError, match=rf"class indices in \[0, 3\), as probabilities have no ignore_index: index {index} is out"
    ):
        cf.smooth_labels(torch.randn(2, 3), torch.tensor([0, index]))


def test_batches_of_other_forms_have_a_target_key() -> None:
    class Model(LinearModel):
        def forward(self, batch):  # type: ignore[no-untyped-def, override]
            return self.linear(batch["x"])

        def loss(self, outputs, batch):  # type: ignore[no-untyped-def, override]
            return F.cross_entropy(outputs, batch["y"])

    seen = At(Event.BEFORE_BACKWARD, lambda state: (state.loss.detach(), state.outputs.detach(), state.batch["y"]))
    data = [{"x": torch.randn(4, 8), "y": torch.tensor([0, 1, 2, 0])}]
    arguments = {"max_duration": "1ba", "callbacks": seen, "device": "cpu", "progress_bar": False}
    Trainer(Model(), data, algorithms=LabelSmoothing(0.3, target_key="y"), **arguments).fit()
    loss, outputs, targets = seen.answers[0]
    torch.testing.assert_close(loss, F.cross_entropy(outputs, targets, label_smoothing=0.3))


def test_a_batch_without_targets_is_refused() -> None:
    class Model(LinearModel):
        def loss(self, outputs, batch):  # type: ignore[no-untyped-def, override]
            return outputs.sum()

    arguments = {"max_duration": "1ba", "device": "cpu", "progress_bar": False}
    trainer = Trainer(Model(), [[torch.randn(4, 8)]], algorithms=LabelSmoothing(), **arguments)
    with pytest.raises(ValueError, match="LabelSmoothing needs batches with a tensor at target_key=1"):
        trainer.fit()
