"""Runs algorithms and callbacks at the events of a training run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .algorithm import Algorithm
from .callback import Callback
from .event import Event
from .hooks import Hook, check_hook_names, find_hook
from .logger import Logger
from .logger_destination import LoggerDestination
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
    """Runs the algorithms and callbacks that act at an event.

    Algorithms run first, in the order of ``state.algorithms`` or, at the events that `Event` lists, in the
    reverse order; passes can rearrange them. Then ``state.callbacks`` run, then the logger's destinations, both
    always in their order.

    Args:
        state: The state that they act on. Its list of callbacks must not change afterwards.
        logger: The logger that is passed to them.

    Raises:
        TypeError: If a callback has a method that resembles an event but matches none.
    """

    def __init__(self, state: State, logger: Logger) -> None:
        self.state = state
        self.logger = logger
        self._passes: list[Pass] = [set_filo_order]
        self._is_initialised = False
        self._is_closed = False
        self._listeners: tuple[Callback, ...] = (*state.callbacks, *logger.destinations)
        for listener in self._listeners:
            check_hook_names(listener)
        self._hooks = {event: self._find_hooks(event) for event in Event}
        self._preparations = {Event.INIT: self._check_init, Event.AFTER_DATALOADER: logger.begin_step}

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
        if event in self._preparations:
            self._preparations[event]()
        hooks = self._hooks[event]
        if not self.state.algorithms and not hooks and len(self._passes) == 1:  # nothing listens
            return ()
        algorithms: Sequence[Algorithm] = [a for a in self.state.algorithms if a.match(event, self.state)]
        traces: tuple[Trace, ...] = ()
        if algorithms or len(self._passes) > 1:  # set_filo_order alone has nothing to do without algorithms
            for algorithm_pass in self._passes:
                algorithms = algorithm_pass(algorithms, event)
            traces = tuple(
                Trace(algorithm, event, order, algorithm.apply(event, self.state, self.logger))
                for order, algorithm in enumerate(algorithms)
            )
        for hook in hooks:
            hook(self.state, self.logger)
        return traces

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def close(self) -> None:
        """Close every algorithm, callback and destination, once. If one fails, the others are still closed.

        Raises:
            ExceptionGroup: With all errors, after all were closed.
        """
        if self._is_closed:
            return
        self._is_closed = True
        errors = []
        closing: list[tuple[Any, Callable[[], None]]] = [
            *((algorithm, partial(algorithm.close, self.state)) for algorithm in self.state.algorithms),
            *((listener, partial(listener.close, self.state, self.logger)) for listener in self._listeners),
            *((listener, listener.post_close) for listener in self._listeners),
        ]
        for listener, close in closing:
            try:
                close()
            except Exception as error:
                if not self.logger.has_failed(listener):  # or it was logged
                    errors.append(error)
        if errors:
            raise ExceptionGroup("algorithms or callbacks failed to close", errors)

    def _check_init(self) -> None:
        if self._is_initialised:
            raise RuntimeError("INIT runs once, on the raw model; it has run already")
        for algorithm in self.state.algorithms:
            algorithm.check_state(self.state)
        self._is_initialised = True

    def _find_hooks(self, event: Event) -> list[Hook]:
        """The overridden methods, so that an event without a listener calls nothing."""
        hooks: list[Hook] = []
        for listener in self._listeners:
            hook = find_hook(listener, event)
            if hook is None:
                continue
            if isinstance(listener, LoggerDestination) and event is not Event.INIT:  # an error at INIT is raised
                hook = partial(self.logger.call, listener, hook)
            hooks.append(hook)
        return hooks
