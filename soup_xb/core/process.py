"""Processes of our own: how one is started, and how many share the work on data."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

_BEGIN = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "


def python_command(statement: str) -> list[str]:
    """The words that run `statement` in a new process; words after them are its `sys.argv[1:]`.

    `python -m` would look for modules in the current folder first, which may be anybody's.
    """
    return [sys.executable, "-c", _BEGIN + statement, json.dumps(sys.path)]


# Starting a process takes as long as tokenizing about so much text.
BYTES_A_PROCESS = 4 * 2**20
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_processors(quota: Path = _QUOTA) -> int:
    """Processors that this process may use: those it is bound to, and no more than a container's share of them."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        allowed, period = quota.read_text("ascii").split()
    except (OSError, ValueError):
        return bound
    return min(bound, math.ceil(int(allowed) / int(period))) if allowed.isdecimal() else bound


def tokenizing_processes(size: int) -> int:
    """How many processes tokenize `size` bytes of rows; 1 means this one."""
    return max(1, min(available_processors(), size // BYTES_A_PROCESS))
