"""SAM against a plain PyTorch loop."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import etude.functional as cf
from etude import Algorithm, Event, State, Trainer
from etude.algorithms import SAM, CutMix, GradientClipping, LabelSmoothing, MixUp, StochasticDepth
from helpers.battery import make_model, make_trainer
from helpers.networks import images, tiny_resnet
from helpers.parallel_training import assert_same_on_all_ranks, largest_difference
from helpers.ranks import on_ranks
from helpers.recording import At
from helpers.resumable import differences


def batchnorms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def train_by_hand(model: Any, optimizer: Optimizer, batches: Any, rho: float, interval: int = 1) -> None:
    """Algorithm 1 of the paper: no function of ours. BatchNorm keeps the statistics of the first pass."""
    for number, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        if number % interval == 0:
            with torch.no_grad():
                trained = [p for p in model.parameters() if p.grad is not None]
                norm = sum((p.grad.double() ** 2).sum() for p in trained).sqrt()
                before = [p.clone() for p in trained]
                for p in trained:
                    p += (rho * p.grad.double() / norm).to(p.dtype)
            momenta = [module.momentum for module in batchnorms(model)]
            for module in batchnorms(model):
                module.momentum = 0.0
            optimizer.zero_grad()
            model.loss(model(batch), batch).backward()
            with torch.no_grad():
                for p, old in zip(trained, before, strict=True):
                    p.copy_(old)
            for module, momentum in zip(batchnorms(model), momenta, strict=True):
                module.momentum = momentum
                assert module.num_batches_tracked is not None
                module.num_batches_tracked -= 1
        optimizer.step()


def optimizer_of(model: nn.Module, kind: str) -> Optimizer:
    if kind == "adamw":
        return AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, fused=kind == "fused")


@pytest.mark.parametrize("kind", ["sgd", "fused", "adamw"])
@pytest.mark.parametrize(("rho", "interval"), [(0.05, 1), (0.5, 1), (0.5, 2), (0.5, 3)])
def test_it_equals_a_loop_by_hand(kind: str, rho: float, interval: int) -> None:
    model, expected = make_model().double(), make_model().double()
    batches = [(inputs.double(), targets) for inputs, targets in images(num_samples=24)]
    arguments: Any = {"max_duration": "1ep", "device": "cpu", "progress_bar": False}
    algorithm = SAM(rho, interval=interval)
    trainer = Trainer(model, batches, algorithms=algorithm, optimizers=optimizer_of(model, kind), **arguments)
    trainer.fit()
    train_by_hand(expected, optimizer_of(expected, kind), batches, rho, interval)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-9)
    plain = make_model().double()
    train_by_hand(plain, optimizer_of(plain, kind), batches, rho, interval=99)
    assert largest_difference(plain, model) > 1e-4


def test_weights_are_moved_by_rho_and_moved_back_to_the_bit() -> None:
    model = tiny_resnet()
    (batch,) = images(num_samples=4)
    model.loss(model(batch), batch).backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    with cf.sam_perturbation(model, rho=0.3):
        moves = torch.cat([(p - before[name]).detach().flatten() for name, p in model.named_parameters()])
        assert float(moves.norm()) == pytest.approx(0.3, rel=1e-4)
        torch.testing.assert_close(moves, 0.3 * gradients / gradients.norm(), rtol=0, atol=1e-6)
        model(batch)
    assert differences(before, dict(model.state_dict())) == []


def test_weights_are_moved_back_after_an_error() -> None:
    model = tiny_resnet()
    (batch,) = images(num_samples=4)
    model.loss(model(batch), batch).backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="in the body"), cf.sam_perturbation(model):
        raise RuntimeError("in the body")
    assert differences(before, dict(model.state_dict())) == []


@pytest.mark.parametrize("mixing", [MixUp(0.8), CutMix(), MixUp(0.8, interpolate_loss=True)])
@pytest.mark.parametrize("order", [1, -1])
def test_both_passes_see_the_same_mixed_rows(mixing: Algorithm, order: int) -> None:
    seen = At(Event.BEFORE_LOSS, lambda state: tuple(state.batch))
    losses = At(Event.BEFORE_BACKWARD, lambda state: state.loss.detach())
    algorithms = [mixing, SAM(1e-9)][::order]
    trainer = make_trainer(algorithms, callbacks=[seen, losses], device_train_microbatch_size=2)
    trainer.fit()
    assert len(seen.answers) == 6 * 4
    for step in range(6):
        first, second = seen.answers[4 * step : 4 * step + 2], seen.answers[4 * step + 2 : 4 * step + 4]
        assert differences(first, second) == []
        first, second = losses.answers[4 * step : 4 * step + 2], losses.answers[4 * step + 2 : 4 * step + 4]
        torch.testing.assert_close(torch.stack(first), torch.stack(second), rtol=0, atol=1e-5)
    trainer.close()


@pytest.mark.parametrize("method", ["block", "sample"])
def test_both_passes_drop_the_same_blocks(method: Any) -> None:
    plans: list[Any] = []
    depth = StochasticDepth(drop_rate=0.5, stochastic_method=method)
    seen = At(Event.BEFORE_FORWARD, lambda state: plans.append(depth.plan.decisions))
    trainer = make_trainer([depth, LabelSmoothing(), SAM()], callbacks=seen)
    trainer.fit()
    assert len(plans) == 12
    assert all((first == second).all() for first, second in zip(plans[::2], plans[1::2], strict=True))
    assert any((one != plans[0]).any() for one in plans)
    trainer.close()


def test_the_clipped_gradients_are_the_last_ones() -> None:
    class Norms(Algorithm):
        """First in the order, so last at AFTER_TRAIN_BATCH."""

        def __init__(self) -> None:
            self._norms: list[float] = []

        def match(self, event: Event, state: State) -> bool:
            return event is Event.AFTER_TRAIN_BATCH

        def apply(self, event: Event, state: State, logger: Any) -> None:
            gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
            self._norms.append(float(nn.utils.get_total_norm(gradients)))

    norms = Norms()
    trainer = make_trainer([norms, GradientClipping("norm", 1e-3), SAM()])
    trainer.fit()
    assert norms._norms == pytest.approx([1e-3] * 6, rel=1e-3)
    trainer.close()


def test_bfloat16_and_microbatches_train() -> None:
    trainer = make_trainer(SAM(), precision="amp_bf16", device_train_microbatch_size=2)
    trainer.fit()
    assert all(p.dtype is torch.float32 and p.isfinite().all() for p in trainer.state.model.parameters())
    trainer.close()


def test_float16_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="SAM needs precision='fp32' or 'amp_bf16', got 'amp_fp16'"):
        make_trainer(SAM(), precision="amp_fp16")


@on_ranks(2)
@pytest.mark.parametrize("size", [None, 1])
def test_two_ranks_move_the_weights_by_the_gradients_of_both(size: int | None) -> None:
    trainer = make_trainer(
        [StochasticDepth(drop_rate=0.5), SAM(0.5)],
        make_model(frozen_batchnorm=True),
        device_train_microbatch_size=size,
    )
    moved: list[Tensor] = []
    trainer.state.model.register_forward_hook(
        lambda model, args, output: moved.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    )
    trainer.fit()
    assert_same_on_all_ranks(trainer.state.model)
    vector = nn.Module()
    vector.register_parameter("moved", nn.Parameter(torch.stack(moved)))
    assert_same_on_all_ranks(vector)
    trainer.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 0}, "rho must be a finite number > 0, got 0"),
        ({"epsilon": 0.0}, "epsilon must be a finite number > 0, got 0.0"),
        ({"interval": 0}, "interval must be an int >= 1, got 0"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAM(**settings)
