"""Running events, traces, passes, closing."""

from typing import Any

import pytest
from torch import nn

from etude.engine import Algorithm, Callback, Engine, Event, Logger, LoggerDestination, State, Trace


class Act(Algorithm):
    """Notes its name in `log` at one event."""

    def __init__(self, name, log, event=Event.BATCH_START, exit_code=None):
        self.name, self.log, self.event, self.exit_code = name, log, event, exit_code
        self.arguments = []

    def match(self, event, state):
        self.arguments.append((event, state))
        return event is self.event

    def apply(self, event, state, logger):
        self.arguments.append((event, state, logger))
        self.log.append(self.name)
        return self.exit_code


class Note(LoggerDestination):
    """Notes its name in `log` at BATCH_START and when it is closed."""

    def __init__(self, name, log, error=None):
        self.name, self.log, self.error = name, log, error

    def batch_start(self, state, logger):
        self.log.append(self.name)

    def close(self, state, logger):
        self.log.append(f"{self.name} closed")
        if self.error is not None:
            raise self.error


def engine_of(algorithms=(), callbacks=(), destinations=()) -> Engine:
    state = State(model=nn.Identity(), algorithms=algorithms, callbacks=callbacks)
    return Engine(state, Logger(state, destinations))


class TestAlgorithms:
    def test_the_matching_ones_run_in_the_order_of_the_state(self):
        log: list[Any] = []
        algorithms = [Act("a", log), Act("b", log, Event.BATCH_END), Act("c", log)]
        engine_of(algorithms).run_event(Event.BATCH_START)
        assert log == ["a", "c"]

    def test_match_and_apply_get_event_state_and_logger(self):
        algorithm = Act("a", [])
        engine = engine_of([algorithm])
        engine.run_event(Event.BATCH_START)
        event = Event.BATCH_START
        assert algorithm.arguments == [(event, engine.state), (event, engine.state, engine.logger)]

    def test_one_that_does_not_match_is_not_applied(self):
        log: list[Any] = []
        engine = engine_of([Act("a", log, Event.BATCH_END)])
        assert engine.run_event(Event.BATCH_START) == ()
        assert log == []

    def test_all_match_before_the_first_acts(self):
        """An algorithm that changes the state does not decide whether the next one runs at this event."""
        log: list[Any] = []

        class WhileUntouched(Act):
            def match(self, event, state):
                return state.loss is None

            def apply(self, event, state, logger):
                state.loss = "touched"
                self.log.append(self.name)

        engine_of([WhileUntouched("a", log), WhileUntouched("b", log)]).run_event(Event.BEFORE_LOSS)
        assert log == ["a", "b"]

    def test_traces_record_algorithm_order_and_exit_code(self):
        algorithms = [Act("a", [], exit_code=5), Act("b", [], Event.BATCH_END), Act("c", [])]
        traces = engine_of(algorithms).run_event(Event.BATCH_START)
        assert traces == (
            Trace(algorithms[0], Event.BATCH_START, order=0, exit_code=5),
            Trace(algorithms[2], Event.BATCH_START, order=1, exit_code=None),
        )


class TestPasses:
    def test_a_pass_arranges_the_algorithms(self):
        log: list[Any] = []
        algorithms = [Act("a", log), Act("b", log), Act("c", log)]
        engine = engine_of(algorithms)
        engine.register_pass(lambda matching, event: matching[::-1])
        traces = engine.run_event(Event.BATCH_START)
        assert log == ["c", "b", "a"]
        assert [(trace.algorithm, trace.order) for trace in traces] == [(algorithms[n], 2 - n) for n in (2, 1, 0)]

    def test_a_pass_adds_and_removes_algorithms(self):
        log: list[Any] = []
        engine = engine_of([Act("a", log), Act("b", log)])
        engine.register_pass(lambda matching, event: [matching[1], Act("new", log)])
        engine.run_event(Event.BATCH_START)
        assert log == ["b", "new"]

    def test_a_pass_may_remove_everything(self):
        log: list[Any] = []
        engine = engine_of([Act("a", log)])
        engine.register_pass(lambda matching, event: [])
        assert engine.run_event(Event.BATCH_START) == ()
        assert log == []

    def test_passes_get_the_matching_algorithms_and_the_event_one_after_the_other(self):
        seen = []
        a, b = Act("a", []), Act("b", [], Event.BATCH_END)
        engine = engine_of([a, b])
        engine.register_pass(lambda matching, event: seen.append((list(matching), event)) or [b])
        engine.register_pass(lambda matching, event: seen.append((list(matching), event)) or matching)
        engine.run_event(Event.BATCH_START)
        assert seen == [([a], Event.BATCH_START), ([b], Event.BATCH_START)]


class TestCallbacks:
    def test_they_run_after_the_algorithms_and_before_the_destinations(self):
        log: list[Any] = []
        engine = engine_of(
            [Act("algorithm", log)], [Note("first", log), Note("second", log)], [Note("destination", log)]
        )
        engine.run_event(Event.BATCH_START)
        assert log == ["algorithm", "first", "second", "destination"]

    @pytest.mark.parametrize("event", Event)
    def test_each_event_calls_the_method_of_its_value_and_no_other(self, event):
        calls = []

        def noting(name):
            return lambda self, state, logger: calls.append((name, state, logger))

        listener = type("Listener", (Callback,), {other.value: noting(other.value) for other in Event})()
        engine = engine_of(callbacks=[listener])
        engine.run_event(event)
        assert calls == [(event.value, engine.state, engine.logger)]

    @pytest.mark.parametrize("event", Event)
    def test_an_event_without_listeners_calls_nothing(self, event, monkeypatch):
        """What is not overridden is not even called: the plain method of the base class explodes here."""

        def explode(self, state, logger):
            raise AssertionError("called")

        monkeypatch.setattr(Callback, event.value, explode)
        log: list[Any] = []
        listener = Note("a", log) if event is not Event.BATCH_START else Callback()
        assert engine_of(callbacks=[listener]).run_event(event) == ()
        assert log == []

    def test_a_method_given_to_an_instance_is_called(self):
        log: list[Any] = []
        callback = Callback()
        callback.batch_end = lambda state, logger: log.append("called")  # type: ignore[method-assign]
        engine_of(callbacks=[callback]).run_event(Event.BATCH_END)
        assert log == ["called"]


class TestInit:
    def test_it_runs_once(self):
        log: list[Any] = []
        engine = engine_of([Act("a", log, Event.INIT)])
        engine.run_event(Event.INIT)
        with pytest.raises(RuntimeError, match="INIT runs once, on the raw model; it has run already"):
            engine.run_event(Event.INIT)
        assert log == ["a"]

    def test_other_events_may_run_again(self):
        log: list[Any] = []
        engine = engine_of([Act("a", log)])
        engine.run_event(Event.BATCH_START)
        engine.run_event(Event.BATCH_START)
        assert log == ["a", "a"]


class TestClose:
    def test_callbacks_and_destinations_are_closed_once(self):
        log: list[Any] = []
        engine = engine_of(callbacks=[Note("callback", log)], destinations=[Note("destination", log)])
        assert not engine.is_closed
        engine.close()
        engine.close()
        assert engine.is_closed
        assert log == ["callback closed", "destination closed"]

    def test_one_that_fails_does_not_keep_the_others_open(self):
        log: list[Any] = []
        errors = [OSError("disk"), ValueError("bar")]
        callbacks = [Note("a", log, errors[0]), Note("b", log), Note("c", log, errors[1])]
        engine = engine_of(callbacks=callbacks, destinations=[Note("d", log)])
        with pytest.raises(ExceptionGroup, match="callbacks failed to close") as caught:
            engine.close()
        assert log == ["a closed", "b closed", "c closed", "d closed"]
        assert list(caught.value.exceptions) == errors
        assert engine.is_closed

    @pytest.mark.parametrize("event", Event)
    def test_a_closed_engine_refuses_every_event(self, event):
        engine = engine_of()
        engine.close()
        with pytest.raises(RuntimeError, match=f"the engine is closed and runs no event, got {event.name}$"):
            engine.run_event(event)

    def test_post_close_comes_after_all_were_closed(self) -> None:
        log: list[str] = []

        class Last(Note):
            def post_close(self) -> None:
                log.append(f"{self.name} post_close")

        engine = engine_of(callbacks=[Last("a", log), Note("b", log)], destinations=[Last("c", log)])
        engine.close()
        assert log == ["a closed", "b closed", "c closed", "a post_close", "c post_close"]


class TestRunEvent:
    def test_a_callback_that_overrides_run_event_gets_every_event_instead_of_its_methods(self) -> None:
        log: list[Event] = []

        class Listener(Callback):
            def run_event(self, event: Event, state: State, logger: Logger) -> None:
                log.append(event)

            def batch_end(self, state: State, logger: Logger) -> None:
                raise AssertionError("called")

        engine = engine_of(callbacks=[Listener()])
        for event in Event:
            engine.run_event(event)
        assert log == list(Event)

    def test_it_calls_the_method_of_the_event(self) -> None:
        log: list[str] = []
        Note("a", log).run_event(Event.BATCH_START, State(model=nn.Identity()), None)  # type: ignore[arg-type]
        assert log == ["a"]


class TestNamesOfHooks:
    @pytest.mark.parametrize(
        ("name", "nearest"),
        [
            ("on_batch_end", "batch_end"),
            ("batch_ended", "batch_end"),
            ("end_batch", "batch_end"),
            ("epoch_begin", "epoch_start"),
            ("on_validation_end", "eval_end"),
            ("after_forwards", "after_forward"),
            ("before_batch_train", "before_train_batch"),
            ("on_anything", "after_loading"),
        ],
    )
    def test_a_method_that_looks_like_a_hook_is_refused_with_the_nearest_event(self, name: str, nearest: str) -> None:
        listener = type("Listener", (Callback,), {name: lambda self, state, logger: None})
        with pytest.raises(TypeError, match=rf"Listener\.{name} would never be called") as caught:
            engine_of(callbacks=[listener()])
        assert nearest in str(caught.value) or name == "on_anything"

    @pytest.mark.parametrize(
        "name", ["_on_batch_end", "update", "log_images", "generate_end", "iteration_start", "eval"]
    )
    def test_other_methods_are_free(self, name: str) -> None:
        listener = type("Listener", (Callback,), {name: lambda self, state, logger: None})
        engine_of(callbacks=[listener()])

    def test_destinations_are_checked_too(self) -> None:
        listener = type("Listener", (LoggerDestination,), {"batch_ended": lambda self, state, logger: None})
        with pytest.raises(TypeError, match="did you mean batch_end"):
            engine_of(destinations=[listener()])


class TestDestinationThatFails:
    class Broken(LoggerDestination):
        def __init__(self, error: Exception) -> None:
            self.error = error
            self.calls = 0

        def log_metrics(self, metrics: Any, step: int) -> None:
            self.calls += 1
            raise self.error

        def batch_start(self, state: State, logger: Logger) -> None:
            self.calls += 1
            raise self.error

        def close(self, state: State, logger: Logger) -> None:
            raise self.error

    def test_it_is_announced_once_and_not_used_again(self, caplog: pytest.LogCaptureFixture) -> None:
        log: list[str] = []
        broken = self.Broken(OSError("no space left"))
        engine = engine_of(destinations=[broken, Note("a", log)])
        for _ in range(3):
            engine.run_event(Event.BATCH_START)
            engine.logger.log_metrics({"loss": 1.0})
        engine.close()
        assert broken.calls == 1
        assert log == ["a", "a", "a", "a closed"]
        assert [record.getMessage() for record in caplog.records] == [
            "Broken failed, training continues without it: OSError: no space left"
        ]

    @pytest.mark.parametrize("error", [ValueError("bad name"), TypeError("no number")])
    def test_a_bad_value_is_raised(self, error: Exception) -> None:
        engine = engine_of(destinations=[self.Broken(error)])
        with pytest.raises(type(error), match=str(error)):
            engine.logger.log_metrics({"loss": 1.0})

    def test_an_error_while_the_trainer_is_built_is_raised(self) -> None:
        class Broken(LoggerDestination):
            def init(self, state: State, logger: Logger) -> None:
                raise OSError("no network")

        with pytest.raises(OSError, match="no network"):
            engine_of(destinations=[Broken()]).run_event(Event.INIT)
