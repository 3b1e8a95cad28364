"""Runs the algorithms and callbacks that answer an event."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .algorithm import Algorithm
from .callback import Callback
from .event import Event
from .logger import Logger
from .passes import Pass, set_filo_order
from .state import State


@dataclass(frozen=True, slots=True)
class Trace:
    """Records that an algorithm ran at an event.

    Args:
        algorithm: The algorithm.
        event: The event.
        order: Its position among the algorithms that ran at this event, in the order in which they ran, from 0.
        exit_code: What `Algorithm.apply` returned.
    """

    algorithm: Algorithm
    event: Event
    order: int
    exit_code: int | None


class Engine:
    """Runs the algorithms and callbacks that listen to an event.

    Algorithms run first, in the order of ``state.algorithms`` or, at the events that `Event` lists, in the
    reverse order; passes can rearrange them. Then ``state.callbacks`` run, then the logger's destinations, both
    always in their order.

    Args:
        state: The state that they act on. Its callbacks must not change afterwards.
        logger: The logger that is passed to them.
    """

    def __init__(self, state: State, logger: Logger) -> None:
        self.state = state
        self.logger = logger
        self._passes: list[Pass] = [set_filo_order]
        self._is_initialised = False
        self._is_closed = False
        self._listeners = (*state.callbacks, *logger.destinations)
        self._hooks = {event: self._overridden(event.value) for event in Event}

    def register_pass(self, algorithm_pass: Pass) -> None:
        """Add a function that reorders, adds or removes algorithms before they run.

        Passes run in the order of their registration, after `set_filo_order`, which every engine starts with:
        the first argument of `algorithm_pass` is in the order in which the algorithms would run.

        Args:
            algorithm_pass: Takes the matching algorithms and the event, returns the algorithms to run.
        """
        self._passes.append(algorithm_pass)

    def run_event(self, event: Event) -> tuple[Trace, ...]:
        """Apply the matching algorithms, then call the callbacks.

        Returns:
            One trace per algorithm, in the order in which they ran.

        Raises:
            RuntimeError: After `close`, or if INIT is run twice.
        """
        if self._is_closed:
            raise RuntimeError(f"the engine is closed and runs no event, got {event.name}")
        if event is Event.INIT:
            self._check_first_init()
        algorithms: Sequence[Algorithm] = [a for a in self.state.algorithms if a.match(event, self.state)]
        traces: tuple[Trace, ...] = ()
        if algorithms or len(self._passes) > 1:  # set_filo_order alone has nothing to do without algorithms
            for algorithm_pass in self._passes:
                algorithms = algorithm_pass(algorithms, event)
            traces = tuple(
                Trace(algorithm, event, order, algorithm.apply(event, self.state, self.logger))
                for order, algorithm in enumerate(algorithms)
            )
        for hook in self._hooks[event]:
            hook(self.state, self.logger)
        return traces

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def close(self) -> None:
        """Close every callback and destination, once. If one of them fails, the others are closed all the same.

        Raises:
            ExceptionGroup: With all errors, after all were closed.
        """
        if self._is_closed:
            return
        self._is_closed = True
        errors = []
        for listener in self._listeners:
            try:
                listener.close(self.state, self.logger)
            except Exception as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup("callbacks failed to close", errors)

    def _check_first_init(self) -> None:
        if self._is_initialised:
            raise RuntimeError("INIT runs once, on the raw model; it has run already")
        self._is_initialised = True

    def _overridden(self, name: str) -> list[Callable[[State, Logger], None]]:
        """The methods of this name that are overridden, so that an event without a listener calls nothing."""
        plain = getattr(Callback, name)
        methods = (getattr(listener, name) for listener in self._listeners)
        return [method for method in methods if getattr(method, "__func__", method) is not plain]
