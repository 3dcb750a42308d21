"""Signals and launchers: a run ends after the step it is in, and what torchrun or mlx.launch says of this process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from attrs import frozen

from soup_xb.core.errors import ConfigError

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


_CURE = "launch with torchrun or mlx.launch; for one process alone, unset the variable."


@frozen
class Launch:
    """The place of this process among all that a launcher started."""

    process: int
    processes: int


def launch() -> Launch:
    """The place that the environment tells, 0 of 1 where it tells nothing.

    Raises ConfigError for variables that contradict each other: such a run would wait for processes that do not
    exist, or leave nothing behind.
    """
    processes = _number("WORLD_SIZE") or _number("MLX_WORLD_SIZE") or _hosts_of_a_ring()
    rank = next((name for name in ("RANK", "MLX_RANK") if name in os.environ), None)
    process = _number(rank) or 0 if rank else 0
    if rank is None and processes > 1:
        raise _bad(f"{processes} processes are announced, and `RANK` does not say which this is")
    if process >= processes:
        raise _bad(f"`{rank}` is {process}, and processes count from 0 to {processes - 1}")
    return Launch(process, processes)


def is_first_process() -> bool:
    """Whether this process writes files and speaks to the user."""
    return launch().process == 0


def launched_processes() -> int:
    """How many processes the launcher started."""
    return launch().processes


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    lowest = 0 if name.endswith("RANK") else 1
    if not text.isdecimal() or int(text) < lowest:
        raise _bad(f"`{name}` must be a whole number from {lowest}, got `{text[:40]}`")
    return int(text)


def _hosts_of_a_ring() -> int:
    """mlx.launch's ring tells its processes by a list of hosts in a file."""
    file = os.environ.get("MLX_HOSTFILE")
    if not file:
        return 1
    try:
        hosts = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(f"`MLX_HOSTFILE` cannot be read: {error}") from error
    if not isinstance(hosts, list) or not hosts:
        raise _bad("`MLX_HOSTFILE` must hold a list of hosts")
    return len(hosts)


def _bad(message: str) -> ConfigError:
    return ConfigError("bad-launch", message, where="environment", help=_CURE)
