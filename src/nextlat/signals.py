"""Ctrl-C and SIGTERM, which end a command in the same way."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType
from typing import Any, Self


class StopSignal:
    """Inside this context either signal raises KeyboardInterrupt. Inside `deferred` it is only
    noted, and a second one raises. (In other threads than the main one, where no handler can be
    installed, this does nothing.)

    Attributes:
        received: number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if current_thread() is main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal) or signal.SIG_DFL
        return self

    def __exit__(self, *error: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A first signal is noted in `received`, for whoever asks at a good moment."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a process that prepares rows, which its parent ends
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        first, self.received = self.received is None, number
        if not (self._deferred and first):
            raise KeyboardInterrupt
