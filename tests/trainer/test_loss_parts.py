"""Losses that are tuples or dictionaries."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from etude import Trainer
from etude.loggers import InMemoryLogger
from helpers.networks import LinearModel, vectors
from helpers.ranks import run_on_ranks


class TwoParts(LinearModel):
    """Cross entropy and a penalty on the outputs."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Any:
        parts = {"entropy": nn.functional.cross_entropy(outputs, batch[1]), "penalty": outputs.square().mean()}
        if self.form == "sum":
            return parts["entropy"] + parts["penalty"]
        if self.form == "total":
            return {**parts, "total": parts["entropy"] + parts["penalty"]}
        return parts if self.form == "dict" else tuple(parts.values())


def fit(form: str, **settings: Any) -> tuple[list[Tensor], dict[str, list[float]], dict[str, float]]:
    """The weights, the losses of each step, and those of the evaluation."""
    torch.manual_seed(0)
    model, kept = TwoParts(form), InMemoryLogger()
    trainer = Trainer(
        model,
        vectors(22, 4),
        vectors(10, 4),
        "2ep",
        optimizers=SGD(model.parameters(), lr=0.1),
        loggers=kept,
        progress_bar=False,
        device="cpu",
        **settings,
    )
    trainer.fit()
    losses = {name: [float(value) for _, value in values] for name, values in kept.data.items() if "loss/train" in name}
    return [parameter.detach() for parameter in model.parameters()], losses, trainer.state.eval_metrics


@pytest.mark.parametrize("settings", [{}, {"device_train_microbatch_size": 3}], ids=["whole", "microbatches"])
@pytest.mark.parametrize("form", ["dict", "total", "tuple"])
def test_training_minimizes_their_sum_and_logs_each(form: str, settings: dict[str, Any]) -> None:
    weights, losses, evaluation = fit(form, **settings)
    expected_weights, expected_losses, expected_evaluation = fit("sum", **settings)
    for one, other in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(one, other)
    names = ("loss0", "loss1") if form == "tuple" else ("entropy", "penalty")
    total = expected_losses["loss/train/total"]
    assert losses["loss/train/total"] == pytest.approx(total, abs=1e-6)
    sums = [sum(parts) for parts in zip(*(losses[f"loss/train/{name}"] for name in names), strict=True)]
    assert sums == pytest.approx(total, abs=1e-6)
    assert evaluation["loss/eval/total"] == pytest.approx(expected_evaluation["loss/eval/total"], abs=1e-6)
    assert sum(evaluation[f"loss/eval/{name}"] for name in names) == pytest.approx(evaluation["loss/eval/total"])


def losses_of_a_run() -> tuple[dict[str, list[float]], dict[str, float]]:
    return fit("dict", device_train_microbatch_size=3)[1:]


@pytest.mark.xdist_group("ranks")
def test_on_two_ranks_the_parts_are_means_over_all_rows() -> None:
    losses, evaluation = losses_of_a_run()
    of_rank_zero = run_on_ranks(2, losses_of_a_run)[0]
    for name, values in losses.items():
        assert of_rank_zero[0][name] == pytest.approx(values, abs=1e-6)
    assert of_rank_zero[1] == pytest.approx(evaluation, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ((), r"got \(\)"),
        ({"a": 3.0}, r"got 3.0 at \['a'\]"),
        ((torch.zeros(2),), r"got a tensor of shape \(2,\) at \['loss0'\]"),
        (None, "got None"),
    ],
)
def test_invalid_losses_are_refused(loss: Any, message: str) -> None:
    class Model(LinearModel):
        def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Any:
            return loss

    model = Model()
    trainer = Trainer(
        model,
        vectors(),
        max_duration="1ep",
        optimizers=SGD(model.parameters(), lr=0.1),
        progress_bar=False,
        device="cpu",
    )
    with pytest.raises(ValueError, match=f"model.loss must return a tensor without dimensions.*{message}"):
        trainer.fit()
