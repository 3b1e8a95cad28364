"""Learning rate schedules as functions of the state of a run, with durations as `Time` or time strings.

A schedule gives the factor of the initial learning rate, as Composer's schedulers do. It is evaluated before every
step and depends only on the timestamp and the duration of the run, so it has no state to save.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from ..engine import State, Time, TimeUnit, as_time
from ..engine.checks import check_number

_TOLERANCE = 1e-9  # of the ratio of two durations in different units


class ComposerScheduler(Protocol):
    """The interface of a schedule: any callable of the state, such as a function.

    It must be a pure function of the timestamp and the duration of the training, so that a resumed run gets the same
    values.
    """

    def __call__(self, state: State) -> float:
        """The factor of the initial learning rate of every parameter group, at least 0."""
        ...


@dataclass(frozen=True)
class _Schedule:
    """Base class of the schedules of this module: their fields are times and numbers, checked at construction."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "milestones":
                value = _check_milestones(value)
            elif field.name.startswith("t_"):
                value = _check_time(field.name, value, is_zero_allowed=field.name == "t_warmup")
            else:
                check_number(field.name, value, ge=0)
            object.__setattr__(self, field.name, value)

    def __call__(self, state: State) -> float:
        raise NotImplementedError

    @property
    def depends_on_duration(self) -> bool:
        """Whether `max_duration` changes the learning rate before the end of training."""
        return any(time.unit is TimeUnit.DURATION for _, time in self._times())

    def check(self, state: State) -> None:
        """Check that the schedule fits the training.

        Raises:
            ValueError: If it is longer than the training, or its times cannot be compared.
        """
        for name, time in self._times():
            if state.max_duration is None:
                raise ValueError(f'{name}="{time}" needs a max_duration, got None')
            if time.value and (_ratio(time, state.max_duration, state) or 0.0) > 1 + _TOLERANCE:
                raise ValueError(
                    f"{name} of a {type(self).__name__} must not be longer than the training, "
                    f'max_duration="{state.max_duration}", got "{time}"'
                )

    def _times(self) -> Iterator[tuple[str, Time]]:
        for field in fields(self):
            value = getattr(self, field.name)
            for time in value if isinstance(value, tuple) else (value,):
                if isinstance(time, Time):
                    yield field.name, time


@dataclass(frozen=True)
class _WarmupSchedule(_Schedule):
    t_warmup: str | Time

    def check(self, state: State) -> None:
        super().check(state)
        for name, time in self._times():
            if name != "t_warmup" and not self._warmup_part_of(time, state) < 1:
                raise ValueError(
                    f't_warmup of a {type(self).__name__} must be shorter than its {name}="{time}", '
                    f'got "{self.t_warmup}"'
                )

    def _warmup_factor(self, state: State) -> float | None:
        """The elapsed fraction of the warmup; None after it."""
        elapsed = _elapsed(self.t_warmup, state)
        return elapsed if elapsed < 1 else None

    def _elapsed_after_warmup(self, t_max: str | Time, state: State) -> float:
        """The elapsed fraction of the time between the end of the warmup and `t_max`, in [0, 1]."""
        warmup = self._warmup_part_of(t_max, state)
        return min(1.0, max(0.0, (_elapsed(t_max, state) - warmup) / (1 - warmup)))

    def _warmup_part_of(self, time: str | Time, state: State) -> float:
        ratio = _ratio(as_time(self.t_warmup), as_time(time), state)
        if ratio is None:
            raise ValueError(
                f't_warmup="{self.t_warmup}" and "{time}" need a train_dataloader with a length to be compared'
            )
        return ratio


@dataclass(frozen=True)
class ConstantScheduler(_Schedule):
    """The factor `alpha` until `t_max`, then 1, as torch's ``ConstantLR``.

    Args:
        alpha: The factor, at least 0.
        t_max: Until when.
    """

    alpha: float = 1.0
    t_max: str | Time = "1dur"

    def __call__(self, state: State) -> float:
        return self.alpha if _elapsed(self.t_max, state) < 1 else 1.0


@dataclass(frozen=True)
class LinearScheduler(_Schedule):
    """Linear in time from `alpha_i` at the start to `alpha_f` at `t_max` and after it, as torch's ``LinearLR``.

    Args:
        alpha_i: The first factor, at least 0.
        alpha_f: The last factor, at least 0.
        t_max: When `alpha_f` is reached.
    """

    alpha_i: float = 1.0
    alpha_f: float = 0.0
    t_max: str | Time = "1dur"

    def __call__(self, state: State) -> float:
        return _linear(self.alpha_i, self.alpha_f, min(1.0, _elapsed(self.t_max, state)))


@dataclass(frozen=True)
class MultiStepScheduler(_Schedule):
    """Multiplied by `gamma` at each milestone, as torch's ``MultiStepLR``.

    Args:
        milestones: When, at least one; the order does not matter.
        gamma: The factor, at least 0.
    """

    milestones: Sequence[str | Time]
    gamma: float = 0.1

    def __call__(self, state: State) -> float:
        return _multi_step(self.milestones, self.gamma, state)


@dataclass(frozen=True)
class CosineAnnealingScheduler(_Schedule):
    """Half a cosine from 1 at the start to `alpha_f` at `t_max` and after it, as torch's ``CosineAnnealingLR``.

    Args:
        t_max: When `alpha_f` is reached.
        alpha_f: The last factor, at least 0.
    """

    t_max: str | Time = "1dur"
    alpha_f: float = 0.0

    def __call__(self, state: State) -> float:
        return _cosine(self.alpha_f, min(1.0, _elapsed(self.t_max, state)))


@dataclass(frozen=True)
class ConstantWithWarmupScheduler(_WarmupSchedule):
    """Linear from 0 to `alpha` during the warmup, then `alpha` until `t_max`, then 1.

    Args:
        t_warmup: Duration of the warmup; ``"0ba"`` for none.
        alpha: The factor after the warmup, at least 0.
        t_max: Until when, from the start of training.
    """

    alpha: float = 1.0
    t_max: str | Time = "1dur"

    def __call__(self, state: State) -> float:
        if (warmup := self._warmup_factor(state)) is not None:
            return self.alpha * warmup
        return self.alpha if _elapsed(self.t_max, state) < 1 else 1.0


@dataclass(frozen=True)
class LinearWithWarmupScheduler(_WarmupSchedule):
    """Linear from 0 to `alpha_i` during the warmup, then linear to `alpha_f` at `t_max`.

    Args:
        t_warmup: Duration of the warmup; ``"0ba"`` for none.
        alpha_i: The factor at the end of the warmup, at least 0.
        alpha_f: The last factor, at least 0.
        t_max: When `alpha_f` is reached, from the start of training.
    """

    alpha_i: float = 1.0
    alpha_f: float = 0.0
    t_max: str | Time = "1dur"

    def __call__(self, state: State) -> float:
        if (warmup := self._warmup_factor(state)) is not None:
            return self.alpha_i * warmup
        return _linear(self.alpha_i, self.alpha_f, self._elapsed_after_warmup(self.t_max, state))


@dataclass(frozen=True)
class MultiStepWithWarmupScheduler(_WarmupSchedule):
    """Linear from 0 to 1 during the warmup, then multiplied by `gamma` at each milestone.

    Args:
        t_warmup: Duration of the warmup; ``"0ba"`` for none.
        milestones: When, from the start of training; all of them after the warmup.
        gamma: The factor, at least 0.
    """

    milestones: Sequence[str | Time]
    gamma: float = 0.1

    def __call__(self, state: State) -> float:
        if (warmup := self._warmup_factor(state)) is not None:
            return warmup
        return _multi_step(self.milestones, self.gamma, state)


@dataclass(frozen=True)
class CosineAnnealingWithWarmupScheduler(_WarmupSchedule):
    """Linear from 0 to 1 during the warmup, then half a cosine to `alpha_f` at `t_max`.

    Args:
        t_warmup: Duration of the warmup; ``"0ba"`` for none.
        t_max: When `alpha_f` is reached, from the start of training.
        alpha_f: The last factor, at least 0.
    """

    t_max: str | Time = "1dur"
    alpha_f: float = 0.0

    def __call__(self, state: State) -> float:
        if (warmup := self._warmup_factor(state)) is not None:
            return warmup
        return _cosine(self.alpha_f, self._elapsed_after_warmup(self.t_max, state))


def _linear(first: float, last: float, fraction: float) -> float:
    return first + (last - first) * fraction


def _cosine(last: float, fraction: float) -> float:
    return last + (1 - last) * (1 + math.cos(math.pi * fraction)) / 2


def _multi_step(milestones: Sequence[str | Time], gamma: float, state: State) -> float:
    return gamma ** sum(_elapsed(milestone, state) >= 1 for milestone in milestones)


def _elapsed(time: str | Time, state: State) -> float:
    """The elapsed time as a fraction of `time`, to the batch; it can exceed 1."""
    time = as_time(time)
    return state.progress(time) if time.value else math.inf


def _ratio(time: Time, other: Time, state: State) -> float | None:
    """``time / other``; None if the units differ and the dataloader has no length."""
    (value, unit), (other_value, other_unit) = _without_dur(time, state), _without_dur(other, state)
    if unit is other_unit:
        return value / other_value
    in_epochs, other_in_epochs = state.in_epochs(time), state.in_epochs(other)
    return None if in_epochs is None or other_in_epochs is None else in_epochs / other_in_epochs


def _without_dur(time: Time, state: State) -> tuple[float, TimeUnit]:
    """The value and unit of a time; a fraction of the training in the unit of its duration."""
    if time.unit is not TimeUnit.DURATION or state.max_duration is None:
        return time.value, time.unit
    return time.value * state.max_duration.value, state.max_duration.unit


def _check_time(name: str, value: Any, *, is_zero_allowed: bool = False) -> Time:
    time = as_time(value, name)
    if time.unit.is_clock:
        raise ValueError(f'{name} must be in "ep", "ba", "sp" or "dur", got "{time}"')
    if time < 0 or (time == 0 and not is_zero_allowed):
        raise ValueError(f'{name} must be {"at least 0" if is_zero_allowed else "positive"}, got "{time}"')
    return time


def _check_milestones(milestones: Any) -> tuple[Time, ...]:
    if isinstance(milestones, (str, Time)) or not isinstance(milestones, Sequence) or not milestones:
        raise ValueError(f'milestones must be a list of times such as ["30ep", "60ep"], got {milestones!r}')
    return tuple(_check_time("milestones", milestone) for milestone in milestones)
