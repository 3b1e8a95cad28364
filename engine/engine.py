"""Runs the algorithms and callbacks that answer an event."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .algorithm import Algorithm
from .callback import Callback
from .event import Event
from .logger import Logger
from .state import State

Pass = Callable[[Sequence[Algorithm], Event], Sequence[Algorithm]]


@dataclass(frozen=True, slots=True)
class Trace:
    """That one algorithm ran at one event.

    Args:
        algorithm: Which one.
        event: When.
        order: Its place among the algorithms that ran at this event, from 0.
        exit_code: What `Algorithm.apply` returned.
    """

    algorithm: Algorithm
    event: Event
    order: int
    exit_code: int | None


class Engine:
    """Turns an event into calls.

    Algorithms run first, in the order of ``state.algorithms`` or as the passes arrange them, then
    ``state.callbacks``, then the logger's destinations.

    Args:
        state: What the calls act on. Its algorithms and callbacks are fixed from here on.
        logger: Handed to every call.
    """

    def __init__(self, state: State, logger: Logger) -> None:
        self.state = state
        self.logger = logger
        self._passes: list[Pass] = []
        self._is_initialised = False
        self._is_closed = False
        self._listeners = (*state.callbacks, *logger.destinations)
        self._hooks = {event: self._overridden(event.value) for event in Event}

    def register_pass(self, algorithm_pass: Pass) -> None:
        """Add a function that orders, adds or removes algorithms before they run.

        Args:
            algorithm_pass: Takes the matching algorithms and the event, returns the ones to run.
        """
        self._passes.append(algorithm_pass)

    def run_event(self, event: Event) -> tuple[Trace, ...]:
        """Apply the matching algorithms, then call the callbacks.

        Returns:
            One trace per algorithm that ran, in order.

        Raises:
            RuntimeError: After `close`, or if INIT comes twice.
        """
        if self._is_closed:
            raise RuntimeError(f"the engine is closed and runs no event, got {event.name}")
        if event is Event.INIT:
            self._check_first_init()
        algorithms: Sequence[Algorithm] = [a for a in self.state.algorithms if a.match(event, self.state)]
        traces: tuple[Trace, ...] = ()
        if algorithms or self._passes:
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
        """Close every callback and destination, once. One that fails does not keep the others open.

        Raises:
            ExceptionGroup: With everything that went wrong, after all were closed.
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
        """The methods of this name that do something, so that an unheard event costs nothing."""
        plain = getattr(Callback, name)
        methods = (getattr(listener, name) for listener in self._listeners)
        return [method for method in methods if getattr(method, "__func__", method) is not plain]
