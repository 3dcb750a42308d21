"""How many processes share the work on data: decided here alone."""

from __future__ import annotations

import math
import os
from pathlib import Path

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
