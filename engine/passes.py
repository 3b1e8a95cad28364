"""Passes: functions that reorder or filter the algorithms of an event before they run."""

from collections.abc import Callable, Sequence

from .algorithm import Algorithm
from .event import Event

Pass = Callable[[Sequence[Algorithm], Event], Sequence[Algorithm]]

REVERSED_EVENTS = frozenset(event for event in Event if "AFTER" in event.name.split("_") or event.name.endswith("_END"))


def set_filo_order(algorithms: Sequence[Algorithm], event: Event) -> Sequence[Algorithm]:
    """Reverse the algorithms at AFTER_* and *_END events: first in, last out.

    An algorithm that changes the state at BEFORE_LOSS and restores it at AFTER_LOSS then finds the state as it
    left it, whatever the algorithms after it did in between.

    Args:
        algorithms: The matching algorithms, in the order of ``state.algorithms``.
        event: The event at which they run.

    Returns:
        The algorithms in the order in which they run.
    """
    return algorithms[::-1] if len(algorithms) > 1 and event in REVERSED_EVENTS else algorithms
