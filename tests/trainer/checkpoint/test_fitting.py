"""Saved states that do not fit the optimizer or scheduler."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules
from torch.optim.lr_scheduler import LRScheduler

from etude.trainer.checkpoint.fitting import check_fits

Place = tuple[Any, ...]

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, 0.1),
    "SGD with momentum": lambda p: SGD(p, 0.1, momentum=0.9),
    "Adam": lambda p: optim.Adam(p, amsgrad=True),
    "AdamW": AdamW,
    "AdamW with a tensor": lambda p: AdamW(p, torch.tensor(0.1)),
    "fused AdamW": lambda p: AdamW(p, fused=True),
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad": optim.Adagrad,
    "Adadelta": optim.Adadelta,
    "Adamax": optim.Adamax,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "Rprop": optim.Rprop,
    "ASGD": optim.ASGD,
    "Adafactor": optim.Adafactor,
}
SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "StepLR": lambda o: schedules.StepLR(o, 2),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 4, 4]),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda epoch: 0.9**epoch),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 2, 2),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=20),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 9),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o), schedules.CosineAnnealingLR(o, 9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler([schedules.StepLR(o, 2), schedules.ExponentialLR(o, 0.9)]),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
schedulers = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
WRONG: dict[str, Any] = {
    "None": None,
    "text": "text",
    "negative": -7,
    "fraction": 1.5,
    "nan": float("nan"),
    "complex": 1j,
    "list": [[[]]],
    "dict": {"a": {"b": None}},
    "tensor": torch.ones(2, 7),
    "doubles": torch.ones(3, 4, dtype=torch.float64),
    "bool": True,
}


def network() -> nn.Module:
    return nn.Linear(4, 3)


def trained(make: Callable[[Any], Optimizer], steps: int = 3) -> tuple[dict[str, Any], Optimizer]:
    """The state after some steps, and an optimizer that has made none."""
    model, fresh = network(), make(network().parameters())
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    return deepcopy(optimizer.state_dict()), fresh


def scheduled(make: Callable[[Optimizer], LRScheduler], steps: int = 3) -> tuple[dict[str, Any], LRScheduler]:
    def build() -> LRScheduler:
        return make(SGD(network().parameters(), 0.1, momentum=0.9))

    scheduler = build()
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()
    return deepcopy(scheduler.state_dict()), build()


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, inner in items:
        yield from places(inner, (*place, key))


def at(value: Any, place: Place) -> Any:
    for key in place:
        value = value[key]
    return value


def changed(value: Any, place: Place, new: Any) -> Any:
    if not place:
        return new
    if isinstance(value, dict):
        return {key: changed(item, place[1:], new) if key == place[0] else item for key, item in value.items()}
    return type(value)(changed(item, place[1:], new) if n == place[0] else item for n, item in enumerate(value))


def without(value: Any, place: Place) -> Any:
    if len(place) == 1:
        return {key: item for key, item in value.items() if key != place[0]}
    return changed(value, place[:1], without(value[place[0]], place[1:]))


def is_of_the_same_kind(old: Any, new: Any) -> bool:
    """A wrong value that cannot be detected."""
    if isinstance(old, float):
        return type(new) in (int, float) and new == new
    return type(old) is type(new) and not isinstance(old, (list, dict, Tensor))


@optimizers
def test_the_state_of_an_optimizer_fits(make: Any) -> None:
    state, fresh = trained(make)
    check_fits(state, fresh, 3)
    check_fits(make(network().parameters()).state_dict(), fresh, 0)


@optimizers
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_value_anywhere_in_an_optimizer_is_refused_with_its_path(make: Any, wrong: Any) -> None:
    state, fresh = trained(make)
    for place in places(state):
        if not is_of_the_same_kind(at(state, place), wrong):
            with pytest.raises(ValueError, match=f"must fit the run, .*{type(fresh).__name__}"):
                check_fits(changed(state, place, wrong), fresh, 3)


@optimizers
def test_a_name_too_few_or_too_many_in_an_optimizer_is_refused(make: Any) -> None:
    state, fresh = trained(make)
    named = [place for place in places(state) if place and isinstance(place[-1], str)]
    for place in named:
        with pytest.raises(ValueError, match="must fit the run"):
            check_fits(without(state, place), fresh, 3)
        if place != ("state",) and place != ("param_groups",):
            extra = {**at(state, place[:-1]), "unknown": 1}
            with pytest.raises(ValueError, match="'unknown'"):
                check_fits(changed(state, place[:-1], extra), fresh, 3)


def test_a_parameter_that_was_never_used_has_no_state() -> None:
    state, fresh = trained(lambda p: SGD(p, 0.1, momentum=0.9))
    check_fits(without(state, ("state", 1)), fresh, 3)


@pytest.mark.parametrize("number", [2, -1, "0", True, 0.0])
def test_a_state_of_no_parameter_is_refused(number: Any) -> None:
    state, fresh = trained(AdamW)
    crafted = {**state, "state": {number: state["state"][0], 1: state["state"][1]}}
    with pytest.raises(ValueError, match="the state of one of 2 parameters"):
        check_fits(crafted, fresh, 3)


def test_comparing_changes_nothing_and_calls_no_hook() -> None:
    optimizer = AdamW(network().parameters())
    optimizer.register_step_post_hook(lambda *args: pytest.fail("a hook was called"))
    schedules.StepLR(optimizer, 2)
    state, _ = trained(lambda p: AdamW(p))
    state["param_groups"][0]["initial_lr"] = 1e-3
    before = deepcopy(optimizer.state_dict())
    check_fits(state, optimizer, 3)
    assert optimizer.state_dict() == before
    assert not optimizer.state


class Own(SGD):
    """An optimizer with more in its state than torch's."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, 0.1)
        self.param_groups[0].update(total=0.0, best=None)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["total"], group["best"] = torch.tensor(1.0), 0.5
            for parameter in group["params"]:
                self.state[parameter]["ema"] = parameter.detach().flatten()
        self.state["count"] = 3  # type: ignore[index]


def test_a_custom_optimizer_may_have_any_state() -> None:
    state, fresh = trained(Own)
    assert set(state["state"]) == {0, 1, "count"}
    check_fits(state, fresh, 3)
    with pytest.raises(ValueError, match=r"Own\.param_groups\.0\.lr must be a number, got 'fast'"):
        check_fits(changed(state, ("param_groups", 0, "lr"), "fast"), fresh, 3)


@schedulers
def test_the_state_of_a_scheduler_fits(make: Any) -> None:
    for steps in range(6):
        state, fresh = scheduled(make, steps)
        check_fits(state, fresh, steps)


@schedulers
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_value_anywhere_in_a_scheduler_is_refused_with_its_path(make: Any, wrong: Any) -> None:
    state, fresh = scheduled(make)
    for place in places(state):
        if not is_of_the_same_kind(at(state, place), wrong):
            with pytest.raises(ValueError, match=f"must fit the run, .*{type(fresh).__name__}"):
                check_fits(changed(state, place, wrong), fresh, 3)


@schedulers
def test_a_scheduler_that_is_further_than_the_run_is_refused(make: Any) -> None:
    state, fresh = scheduled(make)
    with pytest.raises(ValueError, match=r"last_epoch must be an int in \[-?\d, \d\], got \d"):
        check_fits(state, fresh, 0)
    for key in [place for place in places(state) if place and place[-1] == "last_epoch"]:
        for number in (-7, 10**200):
            with pytest.raises(ValueError, match="last_epoch must be an int"):
                check_fits(changed(state, key, number), fresh, 3)


def test_other_things_are_not_looked_at() -> None:
    check_fits("anything", nn.Linear(1, 1), 0)
