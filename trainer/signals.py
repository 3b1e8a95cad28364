"""SIGTERM and SIGINT as a request to stop: the running step is finished and saved first."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class TrainingInterrupted(SystemExit):
    """Training was stopped by a signal, after the running step was finished and saved.

    If nobody catches it, the process ends with the code 128 + number of the signal, as shells have it:
    143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return f"training was stopped by {signal.Signals(self.signal_number).name}; it can be resumed"


class SignalListener:
    """Within the context, takes note of the first SIGTERM or SIGINT; a second one acts as without it.

    Handlers are only a main thread's business: in any other the context does nothing.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "SignalListener":
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._take_note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._put_back()

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
