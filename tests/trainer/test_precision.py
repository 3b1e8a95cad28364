"""Mixed precision and loss scaling."""

from typing import get_args

import pytest
import torch
from torch.optim import SGD

from etude import Event
from etude.engine import Callback
from etude.trainer import Trainer
from etude.trainer.precision import Precision, autocast, grad_scaler
from helpers.networks import LinearModel, vectors
from helpers.recording import At

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
precisions = pytest.mark.parametrize("precision", get_args(Precision))


class Types(Callback):
    """Records the dtypes of the outputs, and of the parameters at the end of each batch."""

    def __init__(self):
        self.trained, self.evaluated, self.parameters = set(), set(), set()

    def after_forward(self, state, logger):
        self.trained.add(state.outputs.dtype)

    def eval_after_forward(self, state, logger):
        self.evaluated.add(state.outputs.dtype)

    def batch_end(self, state, logger):
        self.parameters.update(parameter.dtype for parameter in state.model.parameters())


@precisions
@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_every_precision_trains_on_the_cpu(precision, microbatch_size):
    torch.manual_seed(0)
    model, types = LinearModel(), Types()
    trainer = Trainer(
        model,
        vectors(),
        vectors(),
        "5ep",
        optimizers=SGD(model.parameters(), lr=0.5),
        callbacks=types,
        device="cpu",
        precision=precision,
        device_train_microbatch_size=microbatch_size,
        progress_bar=False,
    )
    before = trainer.eval()["loss/eval/total"]
    trainer.fit()
    assert trainer.state.eval_metrics["loss/eval/total"] < 0.9 * before
    assert types.trained == types.evaluated == {DTYPES[precision]}
    assert types.parameters == {torch.float32}


@precisions
def test_every_precision_is_known(precision):
    with autocast(precision, CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype is DTYPES[precision]


@precisions
def test_only_fp16_scales_the_loss(precision):
    """Gradients of fp16 underflow without it."""
    loss = torch.ones(())
    scaled = grad_scaler(precision, CPU).scale(loss)
    assert (scaled > loss) if precision == "amp_fp16" else (scaled == loss)


@precisions
def test_the_scale_of_the_loss_does_not_reach_the_weights(precision):
    weights = []
    for chosen in ("fp32", precision):
        torch.manual_seed(0)
        model = LinearModel()
        Trainer(
            model,
            [(inputs / 8, targets) for inputs, targets in vectors()],
            None,
            "1ep",
            optimizers=SGD(model.parameters(), lr=0.5),
            device="cpu",
            precision=chosen,
            progress_bar=False,
        ).fit()
        weights.append(model.linear.weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=5e-3)


def test_gradients_are_unscaled_when_they_are_called_complete():
    """So that clipping at AFTER_TRAIN_BATCH sees the gradients themselves, also with a loss scaler."""

    def norms(precision):
        norm = At(
            Event.AFTER_TRAIN_BATCH,
            lambda state: float(torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters()])),
        )
        torch.manual_seed(0)
        model = LinearModel()
        Trainer(
            model,
            vectors(),
            max_duration="1ba",
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
            callbacks=norm,
            precision=precision,
            device="cpu",
            progress_bar=False,
        ).fit()
        return norm.answers

    assert norms("amp_fp16") == pytest.approx(norms("fp32"), rel=0.02)
