"""The order of algorithms at AFTER_* and *_END events."""

import inspect
import re
from typing import Any

import pytest
from torch import nn

from etude.engine import Algorithm, Engine, Event, Logger, State
from etude.engine.passes import REVERSED_EVENTS


class Named(Algorithm):
    """Notes its name at every event."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def match(self, event: Event, state: State) -> bool:
        return True

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self.log.append(self.name)


def engine_of(log: list[str], names: str = "abc") -> Engine:
    state = State(model=nn.Identity(), algorithms=[Named(name, log) for name in names])
    return Engine(state, Logger(state))


def listed_in_the_docstring() -> set[str]:
    text = inspect.cleandoc(Event.__doc__ or "").split("Reversed are:")[1].split("Callbacks")[0]
    return set(re.findall(r"[A-Z_]{4,}", text))


@pytest.mark.parametrize("event", Event)
def test_the_order_is_reversed_exactly_at_the_events_that_the_docstring_lists(event: Event) -> None:
    log: list[str] = []
    traces = engine_of(log).run_event(event)
    assert log == (["c", "b", "a"] if event.name in listed_in_the_docstring() else ["a", "b", "c"])
    assert [trace.order for trace in traces] == [0, 1, 2]
    assert [getattr(trace.algorithm, "name", None) for trace in traces] == log


def test_every_event_that_ends_another_one_is_reversed() -> None:
    names = {event.name for event in REVERSED_EVENTS}
    assert names == listed_in_the_docstring()
    for before, after in (("BEFORE", "AFTER"), ("START", "END")):
        begun = {event.name for event in Event if before in event.name}
        assert {name.replace(before, after) for name in begun} & {event.name for event in Event} <= names
        assert not begun & names


def test_a_registered_pass_sees_that_order_and_can_change_it() -> None:
    log: list[str] = []
    seen: list[list[str]] = []
    engine = engine_of(log)

    def restore_order(algorithms: Any, event: Event) -> Any:
        seen.append([algorithm.name for algorithm in algorithms])
        return sorted(algorithms, key=lambda algorithm: algorithm.name)

    engine.register_pass(restore_order)
    traces = engine.run_event(Event.AFTER_LOSS)
    assert seen == [["c", "b", "a"]]
    assert log == ["a", "b", "c"]
    assert [trace.algorithm.name for trace in traces] == log  # type: ignore[attr-defined]


def test_callbacks_keep_their_order() -> None:
    """Only algorithms undo what they did."""
    from etude.engine import Callback

    log: list[str] = []

    class Noting(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def after_loss(self, state: State, logger: Logger) -> None:
            log.append(self.name)

    state = State(model=nn.Identity(), callbacks=[Noting("a"), Noting("b")])
    Engine(state, Logger(state)).run_event(Event.AFTER_LOSS)
    assert log == ["a", "b"]
