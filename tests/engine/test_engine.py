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
        log = []
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
        log = []
        engine = engine_of([Act("a", log, Event.BATCH_END)])
        assert engine.run_event(Event.BATCH_START) == ()
        assert log == []

    def test_all_match_before_the_first_acts(self):
        """An algorithm that changes the state does not decide whether the next one runs at this event."""
        log = []

        class WhileUntouched(Act):
            def match(self, event, state):
                return state.loss is None

            def apply(self, event, state, logger):
                state.loss = "touched"
                self.log.append(self.name)

        engine_of([WhileUntouched("a", log), WhileUntouched("b", log)]).run_event(Event.BEFORE_LOSS)
        assert log == ["a", "b"]

    def test_traces_tell_who_ran_when_and_with_what_exit_code(self):
        algorithms = [Act("a", [], exit_code=5), Act("b", [], Event.BATCH_END), Act("c", [])]
        traces = engine_of(algorithms).run_event(Event.BATCH_START)
        assert traces == (
            Trace(algorithms[0], Event.BATCH_START, order=0, exit_code=5),
            Trace(algorithms[2], Event.BATCH_START, order=1, exit_code=None),
        )


class TestPasses:
    def test_a_pass_arranges_the_algorithms(self):
        log = []
        algorithms = [Act("a", log), Act("b", log), Act("c", log)]
        engine = engine_of(algorithms)
        engine.register_pass(lambda matching, event: matching[::-1])
        traces = engine.run_event(Event.BATCH_START)
        assert log == ["c", "b", "a"]
        assert [(trace.algorithm.name, trace.order) for trace in traces] == [("c", 0), ("b", 1), ("a", 2)]

    def test_a_pass_adds_and_removes_algorithms(self):
        log = []
        engine = engine_of([Act("a", log), Act("b", log)])
        engine.register_pass(lambda matching, event: [matching[1], Act("new", log)])
        engine.run_event(Event.BATCH_START)
        assert log == ["b", "new"]

    def test_a_pass_may_remove_everything(self):
        log = []
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
        log = []
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
    def test_an_event_that_nobody_answers_calls_nothing(self, event, monkeypatch):
        """What is not overridden is not even called: the plain method of the base class explodes here."""

        def explode(self, state, logger):
            raise AssertionError("called")

        monkeypatch.setattr(Callback, event.value, explode)
        log = []
        listener = Note("a", log) if event is not Event.BATCH_START else Callback()
        assert engine_of(callbacks=[listener]).run_event(event) == ()
        assert log == []

    def test_a_method_given_to_an_instance_is_called(self):
        log = []
        callback = Callback()
        callback.batch_end = lambda state, logger: log.append("called")
        engine_of(callbacks=[callback]).run_event(Event.BATCH_END)
        assert log == ["called"]


class TestInit:
    def test_it_runs_once(self):
        log = []
        engine = engine_of([Act("a", log, Event.INIT)])
        engine.run_event(Event.INIT)
        with pytest.raises(RuntimeError, match="INIT runs once, on the raw model; it has run already"):
            engine.run_event(Event.INIT)
        assert log == ["a"]

    def test_other_events_may_run_again(self):
        log = []
        engine = engine_of([Act("a", log)])
        engine.run_event(Event.BATCH_START)
        engine.run_event(Event.BATCH_START)
        assert log == ["a", "a"]


class TestClose:
    def test_callbacks_and_destinations_are_closed_once(self):
        log = []
        engine = engine_of(callbacks=[Note("callback", log)], destinations=[Note("destination", log)])
        assert not engine.is_closed
        engine.close()
        engine.close()
        assert engine.is_closed
        assert log == ["callback closed", "destination closed"]

    def test_one_that_fails_does_not_keep_the_others_open(self):
        log = []
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
