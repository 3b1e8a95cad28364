"""Algorithms that compute the gradients of a step again, as SAM does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from etude import Algorithm, Event, Trainer
from etude.algorithms import GradientClipping, LabelSmoothing, StochasticDepth
from etude.engine import State
from helpers.networks import LinearModel, images, linear_model, tiny_resnet, vectors
from helpers.parallel_training import assert_same_on_all_ranks
from helpers.ranks import on_ranks
from helpers.resumable import differences

RHO = 0.05


@torch.no_grad()
def ascend(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Move the weights along the gradients; returns the weights before."""
    used = [parameter for parameter in model.parameters() if parameter.grad is not None]
    before = [(parameter, parameter.detach().clone()) for parameter in used]
    for parameter in used:
        assert parameter.grad is not None
        parameter.add_(parameter.grad, alpha=RHO)
    return before


@torch.no_grad()
def move_back(before: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, weight in before:
        parameter.copy_(weight)


class Ascent(Algorithm):
    """Replaces the gradients by those at weights that are moved along the gradients."""

    def match(self, event: Event, state: State) -> bool:
        return event is Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Any) -> None:
        before = ascend(state.model)
        try:
            state.recompute_gradients()
        finally:
            move_back(before)


class Spoil(Algorithm):
    """Makes the loss of one of the passes of a step infinite."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number, self._seen = step, number, 0

    def match(self, event: Event, state: State) -> bool:
        return event is Event.AFTER_LOSS and state.timestamp.batch == self.step

    def apply(self, event: Event, state: State, logger: Any) -> None:
        assert state.loss is not None
        if self._seen == self.number:
            state.loss = state.loss * float("inf")
        self._seen += 1


class Losses(Algorithm):
    """Keeps the loss at the end of each batch, and counts forward passes."""

    def __init__(self) -> None:
        self.values, self.num_forwards = list[Tensor](), 0

    def __repr__(self) -> str:
        return "Losses()"

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BATCH_END, Event.BEFORE_FORWARD)

    def apply(self, event: Event, state: State, logger: Any) -> None:
        if event is Event.BEFORE_FORWARD:
            self.num_forwards += 1
        else:
            assert state.loss is not None
            self.values.append(state.loss.detach())


def sgd(model: nn.Module, fused: bool = False) -> SGD:
    return SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)


def train(model: nn.Module, *algorithms: Algorithm, fused: bool = False, data: Any = None, **settings: Any) -> Trainer:
    settings = {"max_duration": "1ep", "device": "cpu", "progress_bar": False, **settings}
    data = vectors() if data is None else data
    trainer = Trainer(model, data, algorithms=algorithms, optimizers=sgd(model, fused), **settings)
    trainer.fit()
    return trainer


def train_by_hand(*bad_steps: int, fused: bool = False) -> tuple[LinearModel, list[Tensor]]:
    model, losses = linear_model(), []
    optimizer: Optimizer = sgd(model, fused)
    for step, batch in enumerate(vectors()):
        optimizer.zero_grad()
        loss = model.loss(model(batch), batch)
        losses.append(loss.detach())
        if step in bad_steps:
            continue
        loss.backward()
        before = ascend(model)
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        move_back(before)
        optimizer.step()
    return model, losses


@pytest.mark.parametrize("fused", [False, True])
def test_a_second_pass_equals_a_loop_by_hand(fused: bool) -> None:
    losses = Losses()
    trainer = train(linear_model(), Ascent(), losses, fused=fused)
    expected, expected_losses = train_by_hand(fused=fused)
    assert differences(dict(expected.state_dict()), dict(trainer.state.model.state_dict())) == []
    assert [float(loss) for loss in losses.values] == [float(loss) for loss in expected_losses], "of the first pass"
    assert losses.num_forwards == 2 * len(expected_losses)


@pytest.mark.parametrize("microbatch_size", [1, 3, "auto"])
def test_a_second_pass_runs_in_the_microbatches_of_the_step(microbatch_size: Any) -> None:
    losses = Losses()
    trainer = train(linear_model(), Ascent(), losses, device_train_microbatch_size=microbatch_size)
    expected, _ = train_by_hand()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(trainer.state.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert losses.num_forwards == 2 * 6 * {1: 4, 3: 2, "auto": 1}[microbatch_size]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_step_is_skipped_if_one_of_its_passes_is_not_finite(fused: bool, number: int, step: int) -> None:
    trainer = train(linear_model(), Ascent(), Spoil(step, number), fused=fused, max_nonfinite_steps=1)
    expected, _ = train_by_hand(step, fused=fused)
    assert differences(dict(expected.state_dict()), dict(trainer.state.model.state_dict())) == []


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("number", [0, 1])
def test_a_pass_that_is_not_finite_is_an_error(fused: bool, number: int) -> None:
    with pytest.raises(FloatingPointError, match="of step 2"):
        train(linear_model(), Ascent(), Spoil(2, number), fused=fused)


def test_two_steps_with_bad_second_passes_are_two_in_a_row() -> None:
    with pytest.raises(FloatingPointError, match="of step 3"):
        train(linear_model(), Ascent(), Spoil(2, 1), Spoil(3, 1), max_nonfinite_steps=1)


@pytest.mark.parametrize("method", ["block", "sample"])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_both_passes_have_the_same_drop_plan(method: Any, microbatch_size: int | None) -> None:
    """Without moving the weights, gradients are computed twice alike."""

    class Compare(Algorithm):
        def match(self, event: Event, state: State) -> bool:
            return event is Event.AFTER_TRAIN_BATCH

        def apply(self, event: Event, state: State, logger: Any) -> None:
            first = {name: parameter.grad for name, parameter in state.model.named_parameters()}
            state.recompute_gradients()
            for name, parameter in state.model.named_parameters():
                grad = first[name]
                assert parameter.grad is None if grad is None else parameter.grad is not grad
                assert grad is None or torch.equal(parameter.grad, grad), name

    torch.manual_seed(0)
    depth = StochasticDepth(drop_rate=0.5, stochastic_method=method)
    train(
        tiny_resnet(),
        *(GradientClipping("norm", 0.01), Compare(), depth, LabelSmoothing(0.1)),  # gradients are clipped last
        data=images(),
        device_train_microbatch_size=microbatch_size,
    )


@pytest.mark.parametrize("event", [Event.BATCH_START, Event.AFTER_BACKWARD, Event.BATCH_END])
def test_a_second_pass_is_refused_at_other_events(event: Event) -> None:
    class Early(Algorithm):
        def match(self, at: Event, state: State) -> bool:
            return at is event

        def apply(self, event: Event, state: State, logger: Any) -> None:
            state.recompute_gradients()

    with pytest.raises(RuntimeError, match="must be called at AFTER_TRAIN_BATCH"):
        train(linear_model(), Early())


def test_a_second_pass_is_refused_within_one() -> None:
    class Nested(Algorithm):
        def match(self, event: Event, state: State) -> bool:
            return event in (Event.AFTER_TRAIN_BATCH, Event.AFTER_FORWARD) and state.outputs is not None

        def apply(self, event: Event, state: State, logger: Any) -> None:
            if event is Event.AFTER_TRAIN_BATCH or is_second:
                is_second.append(True)
                state.recompute_gradients()

    is_second: list[bool] = []
    with pytest.raises(RuntimeError, match="must be called at AFTER_TRAIN_BATCH"):
        train(linear_model(), Nested())


def test_a_second_pass_is_refused_where_gradients_are_scaled() -> None:
    with pytest.raises(RuntimeError, match="recompute_gradients needs precision='fp32' or 'amp_bf16', got 'amp_fp16'"):
        train(linear_model(), Ascent(), precision="amp_fp16")


def test_a_state_without_a_trainer_has_no_passes_to_repeat() -> None:
    with pytest.raises(RuntimeError, match="recompute_gradients needs a Trainer"):
        State(model=linear_model()).recompute_gradients()


@on_ranks(2)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("microbatch_size", [None, 1, "auto"])
def test_two_ranks_equal_one(fused: bool, microbatch_size: Any) -> None:
    trainer = train(linear_model(), Ascent(), fused=fused, device_train_microbatch_size=microbatch_size)
    assert_same_on_all_ranks(trainer.state.model)
    expected, _ = train_by_hand()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(trainer.state.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


@on_ranks(2)
@pytest.mark.parametrize("fused", [False, True])
def test_all_ranks_skip_a_step_whose_second_pass_is_not_finite_on_one(fused: bool) -> None:
    class OnOne(Spoil):
        def match(self, event: Event, state: State) -> bool:
            return super().match(event, state) and state.rank == 1

    trainer = train(linear_model(), Ascent(), OnOne(2, 1), fused=fused, max_nonfinite_steps=1)
    assert_same_on_all_ranks(trainer.state.model)
    expected, _ = train_by_hand(2)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(trainer.state.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
