"""What a launcher (torchrun, mlx.launch) says about this process before any framework is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path


def is_first_process() -> bool:
    """Whether this process writes files and speaks to the user."""
    return os.environ.get("RANK", os.environ.get("MLX_RANK", "0")) == "0"


def launched_processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("MLX_WORLD_SIZE") or _hosts_of_a_ring())


def _hosts_of_a_ring() -> int:
    """mlx.launch's ring tells its processes by a list of hosts in a file."""
    file = os.environ.get("MLX_HOSTFILE")
    return len(json.loads(Path(file).read_text("utf-8"))) if file else 1
