"""The base class of callbacks."""

import inspect

import pytest

from etude.engine import Callback, Event, LoggerDestination

PLAIN = {"run_event", "close", "post_close", "state_dict", "load_state_dict"}


@pytest.mark.parametrize("cls", [Callback, LoggerDestination])
@pytest.mark.parametrize("name", [*(event.value for event in Event), "close"])
def test_every_method_takes_state_and_logger_and_does_nothing(name, cls):
    method = getattr(cls(), name)
    assert list(inspect.signature(method).parameters) == ["state", "logger"]
    assert method("state", "logger") is None


def test_there_is_no_method_without_an_event():
    """A method that no event calls would never be called."""
    methods = {name for name in vars(Callback) if not name.startswith("_")}
    assert methods - PLAIN == {event.value for event in Event}


def test_the_methods_are_in_the_order_of_the_events() -> None:
    methods = [name for name in vars(Callback) if not name.startswith("_") and name not in PLAIN]
    assert methods == [event.value for event in Event]


def test_by_default_there_is_no_state_and_it_loads():
    callback = Callback()
    assert callback.state_dict() == {}
    callback.load_state_dict(callback.state_dict())
