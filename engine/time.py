"""How long and how far: `Time` with its unit, and `Timestamp`, the position of a training run."""

import re
from dataclasses import dataclass, replace
from enum import Enum
from functools import total_ordering
from typing import Any

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
        """Whether it is wall-clock time, which is no function of the timestamp."""
        return self in (TimeUnit.SECOND, TimeUnit.MINUTE)

    def __str__(self) -> str:
        return self.value


_COUNTED = (TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE)


@total_ordering
@dataclass(frozen=True, slots=True, eq=False)
class Time:
    """An immutable amount of training: ``Time(3, "ep")`` or ``Time.from_timestring("3ep")``.

    Epochs, batches and samples are whole numbers; ``dur`` is a fraction of the whole training; ``sec``
    and ``min`` are wall-clock time, whole or not, and do not convert into each other.
    Times of one unit add, subtract and compare; a time string or a bare number on the other side
    is read as a time (a number in this time's unit).

    Args:
        value: How many units.
        unit: What is counted: a `TimeUnit` or its suffix.

    Raises:
        TypeError: If `value` is not a number, or not a whole one where the unit asks for it.
        ValueError: If the unit is unknown.
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
            raise TypeError(f'a time in "{unit}" must be a whole number, got {self.value!r}')
        if self.value != self.value or self.value in (float("inf"), float("-inf")):
            raise ValueError(f"the value of a time must be finite, got {self.value!r}")
        object.__setattr__(self, "unit", unit)

    @classmethod
    def from_timestring(cls, text: str) -> "Time":
        """Read ``"3ep"``, ``"100ba"``, ``"6400sp"``, ``"0.2dur"``, ``"90sec"`` or ``"1.5min"``.

        Raises:
            ValueError: If `text` is not a number followed by a known unit.
            TypeError: If the number has a fraction and the unit is ``ep``, ``ba`` or ``sp``.
        """
        match = _TIME_STRING.fullmatch(text)
        if match is None:
            raise ValueError(
                f'a time string must be like "3ep", "100ba", "6400sp", "0.2dur", "90sec" or "5min", got {text!r}'
            )
        number, unit = match.groups()
        is_whole = unit != TimeUnit.DURATION.value and number.lstrip("+-").replace("_", "").isdigit()
        return cls(int(number) if is_whole else float(number), unit)  # type: ignore[arg-type]  # __post_init__ converts

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
        return self.value < self._of_same_unit(other)

    def __add__(self, other: "Time | str | int | float") -> "Time":
        return Time(self.value + self._of_same_unit(other), self.unit)

    def __radd__(self, other: int | float) -> "Time":
        return self + other

    def __sub__(self, other: "Time | str | int | float") -> "Time":
        return Time(self.value - self._of_same_unit(other), self.unit)

    def __rsub__(self, other: int | float) -> "Time":
        return self._read(other) - self

    def __neg__(self) -> "Time":
        return Time(-self.value, self.unit)

    def __mul__(self, factor: int | float) -> "Time":
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TypeError(f"a time must be multiplied by a number, got {factor!r}")
        product = self.value * factor
        return Time(int(product) if self.unit in _COUNTED else product, self.unit)

    __rmul__ = __mul__

    def __truediv__(self, other: "Time | str | int | float") -> "Time":
        """Divide by a number, or by a time of the same unit, which gives a fraction in ``dur``."""
        if isinstance(other, (Time, str)):
            return Time(self.value / self._of_same_unit(other), TimeUnit.DURATION)
        if self.unit not in _COUNTED:
            return Time(self.value / other, self.unit)
        return Time(self.value // other if isinstance(other, int) else int(self.value / other), self.unit)

    def _read(self, other: "Time | str | int | float") -> "Time":
        if isinstance(other, (int, float)):
            return Time(other, self.unit)
        return as_time(other)

    def _of_same_unit(self, other: "Time | str | int | float") -> int | float:
        other = self._read(other)
        if other.unit is not self.unit:
            raise ValueError(f'times of different units cannot be combined: "{self}" and "{other}"')
        return other.value


def as_time(value: "Time | str", name: str = "time") -> Time:
    """Read an argument that may be a `Time` or a time string.

    Args:
        value: The argument.
        name: What the error calls it.

    Raises:
        ValueError: If the string cannot be read.
        TypeError: If `value` is neither.
    """
    if isinstance(value, Time):
        return value
    if not isinstance(value, str):
        raise TypeError(f'{name} must be a Time or a time string like "3ep", got {value!r}')
    try:
        return Time.from_timestring(value)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from None


@dataclass(frozen=True, slots=True)
class Timestamp:
    """How far a training run has come: what is *finished*, as whole numbers.

    Args:
        epoch: Finished epochs.
        batch: Finished batches (optimizer steps).
        sample: Samples seen in finished batches, over all ranks.
        batch_in_epoch: Finished batches of the running epoch.
        sample_in_epoch: Samples of the running epoch.
    """

    epoch: int = 0
    batch: int = 0
    sample: int = 0
    batch_in_epoch: int = 0
    sample_in_epoch: int = 0

    def get(self, unit: TimeUnit | str) -> Time:
        """What is finished, counted in `unit` (epochs, batches or samples).

        Raises:
            ValueError: For ``dur``, which needs to know the whole; ask `State.get_elapsed_duration`. For
                ``sec`` and ``min``, which only a clock tells.
        """
        unit = TimeUnit(unit)
        if unit is TimeUnit.DURATION:
            raise ValueError('a timestamp has no "dur": use State.get_elapsed_duration()')
        if unit.is_clock:
            raise ValueError(f'a timestamp has no "{unit}": it counts what is finished and knows no wall-clock time')
        counted = {TimeUnit.EPOCH: self.epoch, TimeUnit.BATCH: self.batch, TimeUnit.SAMPLE: self.sample}
        return Time(counted[unit], unit)

    def to_next_batch(self, num_samples: int) -> "Timestamp":
        """The timestamp after one more batch of `num_samples` samples."""
        return Timestamp(
            self.epoch,
            self.batch + 1,
            self.sample + num_samples,
            self.batch_in_epoch + 1,
            self.sample_in_epoch + num_samples,
        )

    def to_next_epoch(self) -> "Timestamp":
        """The timestamp after the end of the running epoch."""
        return replace(self, epoch=self.epoch + 1, batch_in_epoch=0, sample_in_epoch=0)

    def state_dict(self) -> dict[str, int]:
        """The five counters by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Timestamp":
        """The inverse of `state_dict`."""
        return cls(**{name: int(state[name]) for name in cls.__slots__})
