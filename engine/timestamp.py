"""`Timestamp`, the position of a training run."""

from dataclasses import dataclass
from typing import Any

from .time import Count, Time, TimeUnit


class _Epochs(Count):
    __slots__ = ()
    unit = TimeUnit.EPOCH


class _Batches(Count):
    __slots__ = ()
    unit = TimeUnit.BATCH


class _Samples(Count):
    __slots__ = ()
    unit = TimeUnit.SAMPLE


@dataclass(frozen=True, slots=True, init=False, eq=False)
class Timestamp:
    """The position of a training run: what is finished.

    The counters are ints that also compare with times: ``timestamp.batch % 10 == 0``,
    ``timestamp.epoch == "1ep"``. So does the timestamp itself: ``timestamp >= "300ba"``.

    Args:
        epoch: Finished epochs.
        batch: Finished batches (optimizer steps).
        sample: Samples of the finished batches, over all ranks.
        batch_in_epoch: Finished batches of the current epoch.
        sample_in_epoch: Samples of the finished batches of the current epoch, over all ranks.
    """

    epoch: Count
    batch: Count
    sample: Count
    batch_in_epoch: Count
    sample_in_epoch: Count

    def __init__(
        self, epoch: int = 0, batch: int = 0, sample: int = 0, batch_in_epoch: int = 0, sample_in_epoch: int = 0
    ) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "epoch", _Epochs(epoch))
        set_field(self, "batch", _Batches(batch))
        set_field(self, "sample", _Samples(sample))
        set_field(self, "batch_in_epoch", _Batches(batch_in_epoch))
        set_field(self, "sample_in_epoch", _Samples(sample_in_epoch))

    def get(self, unit: TimeUnit | str) -> Time:
        """What is finished, in `unit` (epochs, batches or samples).

        Raises:
            ValueError: For ``dur``, which needs the duration of the training: see `State.get_elapsed_duration`.
                For ``sec`` and ``min``, which a timestamp does not count.
        """
        unit = TimeUnit(unit)
        if unit is TimeUnit.DURATION:
            raise ValueError('a timestamp has no "dur": use State.get_elapsed_duration()')
        if unit.is_clock:
            raise ValueError(f'a timestamp has no "{unit}": it does not count wall-clock time')
        counted = {TimeUnit.EPOCH: self.epoch, TimeUnit.BATCH: self.batch, TimeUnit.SAMPLE: self.sample}
        return Time(int(counted[unit]), unit)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Timestamp):
            return self.state_dict() == other.state_dict()
        if not isinstance(other, (Time, str)):
            return NotImplemented
        try:
            time = Time.from_input(other)
            return self.get(time.unit) == time
        except (ValueError, TypeError):
            return False

    def __hash__(self) -> int:
        return hash(tuple(self.state_dict().values()))

    def __lt__(self, other: Time | str) -> bool:
        return self._get_like(other) < other

    def __le__(self, other: Time | str) -> bool:
        return self._get_like(other) <= other

    def __gt__(self, other: Time | str) -> bool:
        return self._get_like(other) > other

    def __ge__(self, other: Time | str) -> bool:
        return self._get_like(other) >= other

    def _get_like(self, other: Time | str) -> Time:
        return self.get(Time.from_input(other).unit)

    def copy(self, **changes: int) -> "Timestamp":
        """A copy, with `changes` to the counters by name."""
        return Timestamp(**{**self.state_dict(), **changes})

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
        """The timestamp after the end of the current epoch."""
        return self.copy(epoch=self.epoch + 1, batch_in_epoch=0, sample_in_epoch=0)

    def state_dict(self) -> dict[str, int]:
        """The five counters by name, as plain ints."""
        return {name: int(getattr(self, name)) for name in self.__slots__}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Timestamp":
        """The inverse of `state_dict`."""
        return cls(**{name: int(state[name]) for name in cls.__slots__})
