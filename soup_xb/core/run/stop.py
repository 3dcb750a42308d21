"""A polite stop: a signal raises a flag, and the loop ends after the step that it is in."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
_AT_ONCE = "stopped at once; what was saved before stays, and `--resume` goes on from it"


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
            raise KeyboardInterrupt(_AT_ONCE)
        self.signal = number


@contextmanager
def heard_early() -> Iterator[StopRequest]:
    """The request that signals of the run go to. Inside, a SIGUSR1 is kept for when the steps begin.

    It announces an end that is to come, and left alone it would kill. SIGTERM and SIGINT end a run that has no step
    to lose at once.
    """
    request = StopRequest()
    with _received(request, [number for number in _SIGNALS if number not in (signal.SIGTERM, signal.SIGINT)]):
        yield request


@contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[None]:
    """Inside, SIGTERM, SIGINT and SIGUSR1 ask for a stop after the current step."""
    with _received(request, _SIGNALS):
        yield


@contextmanager
def _received(request: StopRequest, numbers: Sequence[signal.Signals]) -> Iterator[None]:
    before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
