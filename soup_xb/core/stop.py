"""A polite stop: a signal raises a flag, and the loop ends after the step that it is in."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class StopRequest:
    """Whether a signal asked the run to stop, and which."""

    def __init__(self) -> None:
        self.signal: int = 0

    def __call__(self) -> int:
        """The number of the signal that came, 0 without one."""
        return self.signal

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Remember the signal; a second SIGINT stops at once."""
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, SIGTERM, SIGINT and SIGUSR1 ask for a stop after the current step."""
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
