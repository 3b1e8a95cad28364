"""Finds the method of a callback for each event, and methods that are probably meant to be one."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

from .callback import Callback
from .event import Event
from .logger_destination import LoggerDestination

if TYPE_CHECKING:
    from .logger import Logger
    from .state import State

Hook = Callable[["State", "Logger"], Any]

_EVENTS = [event.value for event in Event]
_KNOWN = {name for name in (*dir(Callback), *dir(LoggerDestination)) if not name.startswith("_")}
_SYNONYMS = {
    "begin": "start",
    "begins": "start",
    "started": "start",
    "starts": "start",
    "ended": "end",
    "ends": "end",
    "finish": "end",
    "finished": "end",
    "val": "eval",
    "validation": "eval",
    "step": "batch",
}


def find_hook(listener: Callback, event: Event) -> Hook | None:
    """The method of a callback that an event calls; None if the callback does not override it."""
    if _is_overridden(listener, "run_event"):
        return partial(listener.run_event, event)
    return getattr(listener, event.value) if _is_overridden(listener, event.value) else None


def check_hook_names(listener: Callback) -> None:
    """Check that no public method of a callback resembles an event but would never be called.

    Raises:
        TypeError: With the name of the method and of the nearest event.
    """
    for name in dir(type(listener)):
        is_method = callable(getattr(type(listener), name))
        if name.startswith("_") or name in _KNOWN or not is_method:
            continue
        if (nearest := _nearest_event(name)) is not None:
            raise TypeError(
                f"{type(listener).__name__}.{name} would never be called, as there is no such event: did you mean "
                f"{nearest}? A method that is no hook takes a name with an underscore in front"
            )


def _nearest_event(name: str) -> str | None:
    """The event that a name means; None if it does not look like that of an event."""
    words = [_SYNONYMS.get(word, word) for word in name.removeprefix("on_").split("_")]
    for event in _EVENTS:
        if sorted(words) == sorted(event.split("_")):
            return event
    cutoff = 0.0 if name.startswith("on_") else 0.85
    return next(iter(get_close_matches("_".join(words), _EVENTS, n=1, cutoff=cutoff)), None)


def _is_overridden(listener: Callback, name: str) -> bool:
    method = getattr(listener, name)
    return getattr(method, "__func__", method) is not getattr(Callback, name)
