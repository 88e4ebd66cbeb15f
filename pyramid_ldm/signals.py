"""Ctrl-C and SIGTERM, for loops that end between two steps."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM came while a loop waited for data. No Exception: whoever reads a file and expects any, as one
    does with damaged ones, would take it for the file's."""


class StopRequest:
    """Set by Ctrl-C or SIGTERM; a loop looks at it between steps. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.requested = self._waiting = False

    def wait_for(self, get: Callable[[], T]) -> T:
        """`get()`, which may take for ever: a signal ends it with `Interrupted`."""
        self._waiting = True
        try:
            if self.requested:
                raise Interrupted
            return get()
        finally:
            self._waiting = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if self._waiting:
            self._waiting = False
            raise Interrupted


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Installs the handlers for the length of a loop."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # nobody can send it a signal
        return
    previous = {number: signal.signal(number, request._handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
