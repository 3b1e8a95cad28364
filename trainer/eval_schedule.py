"""When to evaluate in the course of a training."""

from ..engine import State, Time, TimeUnit


class EvalSchedule:
    """Tells when an evaluation is due.

    Args:
        state: Of the run.
        interval: In any unit but wall-clock time; 0 is never.
    """

    def __init__(self, state: State, interval: Time) -> None:
        self._state = state
        self._interval = interval
        self._num_due = 0

    def __bool__(self) -> bool:
        """Whether anything is ever due."""
        return bool(self._interval) and bool(self._state.evaluators)

    def start(self) -> None:
        """Count from the present moment on."""
        self._num_due = self._state.count_intervals(self._interval) if self else 0

    def is_due(self, *, at_end_of_epoch: bool) -> bool:
        """Whether an interval has ended since the last call; intervals of epochs end with them, others with a batch."""
        if not self or (self._interval.unit is TimeUnit.EPOCH) is not at_end_of_epoch:
            return False
        before, self._num_due = self._num_due, self._state.count_intervals(self._interval)
        return self._num_due > before

    def is_overdue(self) -> bool:
        """Whether an interval has ended just now without an evaluation, as where one failed and the run is resumed."""
        timestamp, interval = self._state.timestamp, self._interval
        if not self or not timestamp.batch or self._state.evaluated_at == timestamp.batch:
            return False
        if interval.unit is TimeUnit.EPOCH:
            return not timestamp.batch_in_epoch and not timestamp.epoch % interval
        return interval.unit is TimeUnit.BATCH and not timestamp.batch % interval
