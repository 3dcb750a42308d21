"""A process run to its end, with what it printed last, how long it took and how much memory it held."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Child:
    """`peak_bytes` is the largest resident size of this one process."""

    last_line: str
    seconds: float
    peak_bytes: int


def run_child(command: list[str]) -> Child:
    """Run `command`; its stderr is shown only if it fails, which ends the benchmark."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        actions = [(os.POSIX_SPAWN_DUP2, output.fileno(), 1), (os.POSIX_SPAWN_DUP2, errors.fileno(), 2)]
        process = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
        # wait4 and not getrusage: the latter gives the largest of all children so far.
        _, status, usage = os.wait4(process, 0)
        seconds = time.perf_counter() - started
        output.seek(0)
        errors.seek(0)
        lines = output.read().decode().strip().splitlines()
        if status:
            sys.exit(f"{' '.join(command)[:200]} failed:\n{errors.read().decode()[-4000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Child(lines[-1] if lines else "", seconds, usage.ru_maxrss * unit)
