"""`Time`, a duration with its unit, and `Count`, an int with a unit."""

import re
from dataclasses import dataclass
from enum import Enum
from functools import total_ordering
from typing import ClassVar

_TIME_STRING = re.compile(r"\s*([+-]?(?:\d+(?:_\d+)*\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]+)\s*", re.ASCII)


class TimeUnit(str, Enum):
    """What a `Time` counts. The value is the suffix of the time string."""

    EPOCH = "ep"
    BATCH = "ba"
    SAMPLE = "sp"
    DURATION = "dur"
    SECOND = "sec"
    MINUTE = "min"

    @property
    def is_clock(self) -> bool:
        """Whether the unit is wall-clock time, which a `Timestamp` does not count."""
        return self in (TimeUnit.SECOND, TimeUnit.MINUTE)

    def __str__(self) -> str:
        return self.value


_COUNTED = (TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE)


@total_ordering
@dataclass(frozen=True, slots=True, eq=False)
class Time:
    """An immutable duration of training: ``Time(3, "ep")`` or ``Time.from_timestring("3ep")``.

    Epochs, batches and samples are ints. ``dur`` is a fraction of the whole training. ``sec`` and ``min``
    are wall-clock time; they may have a fraction and do not convert into each other.

    Times of one unit add, subtract, divide and compare. The other operand may also be a time string, or
    a number, which has the unit of this time. A time of any unit may be multiplied by a time in ``dur``.

    Args:
        value: Number of units.
        unit: A `TimeUnit` or its suffix.

    Raises:
        TypeError: If `value` is not a number, or not an int where the unit is ``ep``, ``ba`` or ``sp``.
        ValueError: If the unit is unknown, or `value` is not finite.
    """

    value: int | float
    unit: TimeUnit

    def __post_init__(self) -> None:
        try:
            unit = TimeUnit(self.unit)
        except ValueError:
            known = ", ".join(f'"{u}"' for u in TimeUnit)
            raise ValueError(f"the unit of a time must be one of {known}, got {self.unit!r}") from None
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise TypeError(f"the value of a time must be a number, got {self.value!r}")
        if unit in _COUNTED and not isinstance(self.value, int):
            raise TypeError(f'a time in "{unit}" must be an int, got {self.value!r}')
        if self.value != self.value or self.value in (float("inf"), float("-inf")):
            raise ValueError(f"the value of a time must be finite, got {self.value!r}")
        object.__setattr__(self, "unit", unit)

    @classmethod
    def from_epoch(cls, epoch: int) -> "Time":
        """``Time(epoch, "ep")``."""
        return cls(epoch, TimeUnit.EPOCH)

    @classmethod
    def from_batch(cls, batch: int) -> "Time":
        """``Time(batch, "ba")``."""
        return cls(batch, TimeUnit.BATCH)

    @classmethod
    def from_sample(cls, sample: int) -> "Time":
        """``Time(sample, "sp")``."""
        return cls(sample, TimeUnit.SAMPLE)

    @classmethod
    def from_duration(cls, duration: float) -> "Time":
        """``Time(duration, "dur")``."""
        return cls(duration, TimeUnit.DURATION)

    @classmethod
    def from_timestring(cls, timestring: str) -> "Time":
        """Parse ``"3ep"``, ``"100ba"``, ``"6.4e3sp"``, ``"0.2dur"``, ``"90sec"`` or ``"1.5min"``.

        Raises:
            ValueError: If `timestring` is not a number followed by a known unit.
            TypeError: If the number has a fraction and the unit is ``ep``, ``ba`` or ``sp``.
        """
        match = _TIME_STRING.fullmatch(timestring)
        if match is None:
            raise ValueError(
                f'a time string must be like "3ep", "100ba", "6400sp", "0.2dur", "90sec" or "5min", got {timestring!r}'
            )
        number, unit = match.groups()
        if unit != TimeUnit.DURATION.value and number.lstrip("+-").replace("_", "").isdigit():
            return cls(int(number), unit)  # type: ignore[arg-type]  # __post_init__ converts
        value = float(number)
        is_counted = unit in [counted.value for counted in _COUNTED]
        return cls(int(value) if is_counted and value.is_integer() else value, unit)  # type: ignore[arg-type]

    @classmethod
    def from_input(cls, value: "Time | str | int | float", default_int_unit: TimeUnit | str | None = None) -> "Time":
        """Convert a `Time`, a time string or a number.

        Args:
            value: What to convert.
            default_int_unit: The unit of a number. None refuses numbers, except for the counters of a
                `Timestamp`, which have their own unit.

        Raises:
            ValueError: If a string cannot be parsed.
            TypeError: If `value` is something else, or a number without a unit.
        """
        if isinstance(value, Time):
            return value
        if isinstance(value, str):
            return cls.from_timestring(value)
        if isinstance(value, Count):
            return cls(int(value), value.unit)
        if default_int_unit is not None and isinstance(value, (int, float)):
            return cls(value, default_int_unit)  # type: ignore[arg-type]  # __post_init__ converts
        number = "" if default_int_unit is None else ", or a number"
        raise TypeError(f'a time must be a Time or a time string like "3ep"{number}, got {value!r}')

    def to_timestring(self) -> str:
        """The time string, ``"3ep"``: the inverse of `from_timestring`."""
        return str(self)

    def __str__(self) -> str:
        return f"{self.value}{self.unit}"

    def __int__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __hash__(self) -> int:
        return hash((self.value, self.unit))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (str, int, float)):
            try:
                other = self._read(other)
            except (ValueError, TypeError):
                return False
        if not isinstance(other, Time):
            return NotImplemented
        return self.unit == other.unit and self.value == other.value

    def __lt__(self, other: "Time | str | int | float") -> bool:
        if not isinstance(other, (Time, str, int, float)):
            return NotImplemented  # a Timestamp compares itself
        return self.value < self._of_same_unit(other)

    def __add__(self, other: "Time | str | int | float") -> "Time":
        return Time(self.value + self._of_same_unit(other), self.unit)

    def __radd__(self, other: str | int | float) -> "Time":
        return self + other

    def __sub__(self, other: "Time | str | int | float") -> "Time":
        return Time(self.value - self._of_same_unit(other), self.unit)

    def __rsub__(self, other: str | int | float) -> "Time":
        return self._read(other) - self

    def __mod__(self, other: "Time | str | int | float") -> "Time":
        return Time(self.value % self._of_same_unit(other), self.unit)

    def __rmod__(self, other: int | float) -> "Time":
        return self._read(other) % self

    def __neg__(self) -> "Time":
        return Time(-self.value, self.unit)

    def __mul__(self, factor: "Time | int | float") -> "Time":
        """Multiply by a number, or by a time in ``dur``; a counted unit is rounded down."""
        if isinstance(factor, Time):
            if self.unit is TimeUnit.DURATION:
                return factor * self.value
            if factor.unit is not TimeUnit.DURATION:
                raise ValueError(f'a time must be multiplied by a number or a time in "dur", got "{factor}"')
            factor = factor.value
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TypeError(f"a time must be multiplied by a number, got {factor!r}")
        product = self.value * factor
        return Time(int(product) if self.unit in _COUNTED else product, self.unit)

    __rmul__ = __mul__

    def __truediv__(self, other: "Time | str | int | float") -> "Time":
        """Divide by a number, or by a time of the same unit, which gives a fraction in ``dur``."""
        if isinstance(other, (Time, str, Count)):
            return Time(self.value / self._of_same_unit(other), TimeUnit.DURATION)
        if self.unit not in _COUNTED:
            return Time(self.value / other, self.unit)
        return Time(self.value // other if isinstance(other, int) else int(self.value / other), self.unit)

    def __rtruediv__(self, other: int | float) -> "Time":
        return self._read(other) / self

    def _read(self, other: "Time | str | int | float") -> "Time":
        return Time.from_input(other, self.unit)

    def _of_same_unit(self, other: "Time | str | int | float") -> int | float:
        other = self._read(other)
        if other.unit is not self.unit:
            raise ValueError(f'times of different units cannot be combined: "{self}" and "{other}"')
        return other.value


def as_time(value: Time | str | int, name: str = "time", default_int_unit: TimeUnit | None = None) -> Time:
    """Convert an argument to a `Time`.

    Args:
        value: The argument.
        name: Name of the argument, for the error.
        default_int_unit: The unit of an int; None refuses ints.

    Raises:
        ValueError: If a string cannot be parsed.
        TypeError: If `value` is something else.
    """
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(value, (Time, str)) and not (is_int and default_int_unit):
        number = f' or a number of "{default_int_unit}"' if default_int_unit else ""
        raise TypeError(f'{name} must be a Time or a time string like "3ep"{number}, got {value!r}')
    try:
        return Time.from_input(value, default_int_unit)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from None


class Count(int):
    """A counter of a `Timestamp`: an int that knows its unit and compares with times and time strings."""

    __slots__ = ()
    unit: ClassVar[TimeUnit]

    @property
    def value(self) -> int:
        """The plain int."""
        return int(self)

    def __eq__(self, other: object) -> bool:
        return self._as_time() == other if isinstance(other, str) else int.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return self._as_time() != other if isinstance(other, str) else int.__ne__(self, other)

    __hash__ = int.__hash__

    # With a Time on the other side, int's comparison leaves the answer to that of Time.

    def __lt__(self, other: Time | str | float) -> bool:
        return self._as_time() < other if isinstance(other, str) else int.__lt__(self, other)  # type: ignore[operator]

    def __le__(self, other: Time | str | float) -> bool:
        return self._as_time() <= other if isinstance(other, str) else int.__le__(self, other)  # type: ignore[operator]

    def __gt__(self, other: Time | str | float) -> bool:
        return self._as_time() > other if isinstance(other, str) else int.__gt__(self, other)  # type: ignore[operator]

    def __ge__(self, other: Time | str | float) -> bool:
        return self._as_time() >= other if isinstance(other, str) else int.__ge__(self, other)  # type: ignore[operator]

    def _as_time(self) -> Time:
        return Time(int(self), self.unit)
