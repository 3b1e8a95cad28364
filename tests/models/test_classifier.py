"""ComposerClassifier."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etude.models import ComposerClassifier


def test_it_gives_logits_loss_and_metric_of_a_batch() -> None:
    module = nn.Linear(8, 3)
    model = ComposerClassifier(module, 3)
    inputs, targets = torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1])
    for batch in ((inputs, targets), [inputs, targets]):
        outputs = model(batch)
        assert torch.equal(outputs, module(inputs))
        assert torch.equal(model.loss(outputs, batch), F.cross_entropy(outputs, targets))
        metrics = model.get_metrics(is_train=False)
        assert list(metrics) == ["MulticlassAccuracy"]
        for metric in metrics.values():
            model.update_metric(batch, outputs, metric)
            assert metric.compute() == (outputs.argmax(1) == targets).float().mean()
    assert model.get_metrics(is_train=True) == {}


def test_another_loss_can_be_given() -> None:
    model = ComposerClassifier(nn.Linear(8, 3), 3, loss_fn=lambda outputs, targets: outputs.sum())
    batch = torch.randn(2, 8), torch.tensor([0, 1])
    assert torch.equal(model.loss(model(batch), batch), model(batch).sum())


@pytest.mark.parametrize("batch", [{"x": torch.zeros(2, 8)}, [1, 2, 3]])
def test_a_batch_that_is_no_pair_is_refused(batch: object) -> None:
    with pytest.raises(ValueError, match=r"a batch must be a pair \(inputs, targets\), got a "):
        ComposerClassifier(nn.Linear(8, 3), 3)(batch)


@pytest.mark.parametrize("batch", [torch.zeros(2, 8), (torch.zeros(2, 8),)])
def test_inputs_without_targets_are_predicted_but_have_no_loss(batch: object) -> None:
    model = ComposerClassifier(nn.Linear(8, 3), 3)
    outputs = model(batch)
    assert outputs.shape == (2, 3)
    with pytest.raises(ValueError, match=r"a batch must be a pair \(inputs, targets\), got a "):
        model.loss(outputs, batch)


@pytest.mark.parametrize("num_classes", [0, 1, -3, 2.0, True, None, "ten"])
def test_a_bad_number_of_classes_is_refused(num_classes: object) -> None:
    with pytest.raises((TypeError, ValueError), match=f"num_classes must be an int >= 2, got {num_classes!r}"):
        ComposerClassifier(nn.Linear(8, 3), num_classes)


def test_metrics_see_the_most_probable_class_of_soft_targets() -> None:
    from torchmetrics.classification import MulticlassAccuracy

    model = ComposerClassifier(nn.Linear(8, 3), 3)
    metric = MulticlassAccuracy(3, average="micro")
    outputs, targets = torch.eye(3), torch.tensor([[0.6, 0.4, 0.0], [0.7, 0.3, 0.0], [0.1, 0.2, 0.7]])
    model.update_metric((None, targets), outputs, metric)
    assert float(metric.compute()) == pytest.approx(2 / 3)
