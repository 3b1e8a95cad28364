"""Learning rate schedules that are functions of the state, such as those of ``etude.optim``."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..engine import State

Schedule = Callable[[State], float]


def check_schedules(state: State) -> None:
    """Call the method `check` of every schedule that has one.

    Raises:
        ValueError: If a schedule does not fit the training.
    """
    for schedule in state.schedules:
        if state.max_duration is not None and hasattr(schedule, "check"):
            schedule.check(state)


def keep_initial_learning_rates(state: State) -> None:
    """Keep the learning rate of every parameter group as its ``initial_lr``, if there are schedules.

    It must be there before a checkpoint is loaded, whose optimizers have it.
    """
    if not state.schedules:
        return
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            if "initial_lr" not in group:
                lr = group["lr"]
                group["initial_lr"] = lr.clone() if isinstance(lr, Tensor) else lr


def apply_schedules(state: State) -> None:
    """Set the learning rate of every parameter group to its initial one times the factors of all schedules.

    The initial one is kept in the group as ``initial_lr``, as torch's schedulers do.

    Raises:
        TypeError: If a factor is not a number.
        ValueError: If it is negative or not finite.
    """
    if not state.schedules:
        return
    keep_initial_learning_rates(state)  # of groups that were added since
    factor = math.prod(_factor(schedule, state) for schedule in state.schedules)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            lr = group["lr"]
            if isinstance(lr, Tensor):
                lr.copy_(group["initial_lr"] * factor)  # in place, as a compiled optimizer keeps the tensor
            else:
                group["lr"] = group["initial_lr"] * factor


def _factor(schedule: Schedule, state: State) -> float:
    factor: Any = schedule(state)
    name = getattr(schedule, "__name__", type(schedule).__name__)
    try:
        number = float(factor)
    except (TypeError, ValueError):
        raise TypeError(f"a schedule must return the factor of the learning rate, {name} returned {factor!r}") from None
    if not 0 <= number < math.inf:
        raise ValueError(f"the factor of a learning rate must be finite and at least 0, {name} returned {factor!r}")
    return number
