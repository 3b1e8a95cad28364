"""Drop rates over time: factors on all rates, as pure functions of the training progress."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

from ...engine import State, Time, TimeUnit, as_time
from ...engine.checks import check_number


class Schedule(Protocol):
    """A factor in [0, 1] on all drop rates."""

    @property
    def depends_on_duration(self) -> bool:
        """Whether another `max_duration` changes the factor."""

    def check(self, state: State) -> None:
        """Check, before training, that the schedule fits this training and takes effect."""

    def __call__(self, state: State) -> float:
        """The factor for the next batch."""


@dataclass(frozen=True)
class Warmup:
    """Rises linearly from 0 at the first batch to 1 at the end of `span`, and stays at 1.

    Args:
        span: A `Time` or a time string in ``ep``, ``ba``, ``sp`` or ``dur``, or a number that is a
            fraction of the training.

    Raises:
        TypeError: If `span` is none of these.
        ValueError: If it is negative, of an unknown unit, wall-clock time, or a fraction above 1.
    """

    span: Time | str | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "span", as_span(self.span, "drop_warmup"))

    @property
    def depends_on_duration(self) -> bool:
        """Whether the time is a fraction of the training."""
        return _is_fraction(self._time)

    def check(self, state: State) -> None:
        """Check that the warmup is not longer than the training."""
        _check_within_training(self._time, state, "drop_warmup")

    def __call__(self, state: State) -> float:
        """Linear in batches; exactly 1 at the first batch after the span."""
        return min(1.0, state.progress(self._time)) if self._time else 1.0

    @property
    def _time(self) -> Time:
        assert isinstance(self.span, Time)
        return self.span


@dataclass(frozen=True)
class StartLate:
    """0 before `start`, 1 from then on (late stochastic depth of Liu et al. 2023, arXiv:2303.01500).

    Args:
        start: A `Time`, a time string, or a number that is a fraction of the training.

    Raises:
        ValueError: If it is wall-clock time.
    """

    start: Time | str | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", as_span(self.start, "start"))

    @property
    def depends_on_duration(self) -> bool:
        """Whether the time is a fraction of the training."""
        return _is_fraction(self._time)

    def check(self, state: State) -> None:
        """Check that it is not after the end of training."""
        _check_within_training(self._time, state, "start")

    def __call__(self, state: State) -> float:
        """1 from `start` on, else 0."""
        return float(_has_come(self._time, state))

    @property
    def _time(self) -> Time:
        assert isinstance(self.start, Time)
        return self.start


@dataclass(frozen=True)
class StopEarly:
    """1 before `stop`, 0 from then on (early stochastic depth of Liu et al. 2023, arXiv:2303.01500).

    Args:
        stop: A `Time`, a time string, or a number that is a fraction of the training.

    Raises:
        ValueError: If it is 0, which would switch stochastic depth off from the start, or wall-clock time.
    """

    stop: Time | str | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", as_span(self.stop, "stop"))
        if not self._time:
            raise ValueError(f"stop must be above 0 for stochastic depth to have an effect, got {self._time}")

    @property
    def depends_on_duration(self) -> bool:
        """Whether the time is a fraction of the training."""
        return _is_fraction(self._time)

    def check(self, state: State) -> None:
        """Check that it is not after the end of training."""
        _check_within_training(self._time, state, "stop")

    def __call__(self, state: State) -> float:
        """1 before `stop`, else 0."""
        return float(not _has_come(self._time, state))

    @property
    def _time(self) -> Time:
        assert isinstance(self.stop, Time)
        return self.stop


@dataclass(frozen=True)
class ProgressiveLayerDrop:
    """Progressive layer dropping (Zhang and He 2020, section 4.2, arXiv:2010.13369).

    The paper keeps layer l of L at step t with probability ``1 - l/L * (1 - theta(t))`` with
    ``theta(t) = (1 - theta) * exp(-gamma * t) + theta``. That is a linear distribution with
    ``drop_rate = 1 - theta`` and this factor ``1 - exp(-gamma * t)``.

    Args:
        gamma: How fast the rates rise, per batch, above 0. The paper takes 100 / number of batches.
    """

    gamma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", check_number("gamma", self.gamma, gt=0))

    @property
    def depends_on_duration(self) -> bool:
        """False: the factor depends on the number of batches."""
        return False

    def check(self, state: State) -> None:
        """Every training is supported."""

    def __call__(self, state: State) -> float:
        """0 at the first batch, approaching 1."""
        return -math.expm1(-self.gamma * state.timestamp.batch)


@dataclass(frozen=True)
class FunctionSchedule:
    """A function of the elapsed fraction of training as a schedule.

    Args:
        function: Maps the elapsed fraction, in [0, 1], to a factor in [0, 1].
    """

    function: Callable[[float], float]

    @property
    def depends_on_duration(self) -> bool:
        """True: it is a function of the elapsed fraction."""
        return True

    def check(self, state: State) -> None:
        """Check the values at the start, in the middle and at the end."""
        state.get_elapsed_duration()  # raises if the fraction is not known
        for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
            self._factor(fraction)

    def __call__(self, state: State) -> float:
        """The value of the function at the elapsed fraction."""
        return self._factor(min(1.0, float(state.get_elapsed_duration())))

    def _factor(self, fraction: float) -> float:
        factor = self.function(fraction)
        if isinstance(factor, bool) or not isinstance(factor, Real) or not 0 <= factor <= 1:
            raise ValueError(f"drop_schedule must return a number in [0, 1], got {factor!r} at {fraction}")
        return float(factor)


DropSchedule = Schedule | Callable[[float], float] | Sequence[Schedule | Callable[[float], float]] | None


def as_schedules(drop_schedule: DropSchedule) -> tuple[Schedule, ...]:
    """Convert the argument `drop_schedule`: one schedule or function, several, or None.

    Raises:
        TypeError: If it is something else.
    """
    if drop_schedule is None:
        return ()
    given: Sequence[Any] = drop_schedule if isinstance(drop_schedule, (list, tuple)) else [drop_schedule]
    for schedule in given:
        if not callable(schedule) or isinstance(schedule, type):
            raise TypeError(
                "drop_schedule must be Warmup, StartLate, StopEarly, ProgressiveLayerDrop or a function of the elapsed "
                f"fraction, got {schedule!r}"
            )
    return tuple(item if hasattr(item, "check") else FunctionSchedule(item) for item in given)


def as_span(span: float | str | Time, name: str) -> Time:
    """Convert an argument that is a time: a `Time`, a time string, or a fraction of the training.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it is negative, wall-clock time, or a fraction above 1.
    """
    if isinstance(span, (int, float)) and not isinstance(span, bool):
        time = Time(float(span), TimeUnit.DURATION)
    else:
        time = as_time(span, name)
    if time.unit.is_clock:
        raise ValueError(
            f'{name} must be in epochs, batches, samples or a fraction of training ("ep", "ba", "sp", "dur"), as drop '
            f'rates do not depend on wall-clock time, got "{time}"'
        )
    if time < 0:
        raise ValueError(f"{name} must not be negative, got {time}")
    if time.unit is TimeUnit.DURATION and time > 1:
        raise ValueError(f"{name} must not be longer than the training, got {time}")
    return time


def _is_fraction(span: Time) -> bool:
    return span.unit is TimeUnit.DURATION and bool(span)


def _has_come(moment: Time, state: State) -> bool:
    return not moment or state.progress(moment) >= 1


def _check_within_training(span: Time, state: State, name: str) -> None:
    if not span:
        return
    state.progress(span)  # raises if an epoch has no known length
    whole = state.max_duration
    if whole is None:
        return
    if span.unit is whole.unit:
        is_longer = span > whole
    else:
        in_epochs = state.in_epochs(span), state.in_epochs(whole)
        is_longer = in_epochs[0] is not None and in_epochs[1] is not None and in_epochs[0] > in_epochs[1]
    if is_longer:
        raise ValueError(f'{name} must not be longer than max_duration="{whole}", got "{span}"')
