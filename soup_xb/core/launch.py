"""What a launcher (torchrun, mlx.launch) says about this process before any framework is imported."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """Whether this process writes files and speaks to the user."""
    return os.environ.get("RANK", os.environ.get("MLX_RANK", "0")) == "0"


def launched_processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
