"""SIGTERM and SIGINT as requests to stop after the current step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class TrainingInterrupted(SystemExit):
    """Raised when a signal has stopped the training, after a checkpoint was saved.

    If it is not caught, the process exits with code 128 + signal number: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return f"training was stopped by {signal.Signals(self.signal_number).name}; it can be resumed"


class SignalListener:
    """Context manager that records the first SIGTERM or SIGINT in `received`; a second one has its default effect.

    Signal handlers can only be set in the main thread; in other threads the context does nothing.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "SignalListener":
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._record) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore_handlers()

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
