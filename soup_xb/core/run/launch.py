"""What a launcher (torchrun, mlx.launch) says about this process before any framework is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path

from attrs import frozen

from soup_xb.core.errors import ConfigError

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
