"""The adapters in a checkpoint: trained tensors and what they started from, in the names and shapes of torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from soup_xb.backends.mlx.adapters import Adapters
from soup_xb.core.adapter.starts import Start
from soup_xb.core.errors import CheckpointError
from soup_xb.core.run.checkpoint import check_pairs, grouped, read_tensors

FACTORS_FILE = "factors.safetensors"


def save_adapters(adapters: Adapters, folder: Path) -> None:
    """Write `module.factor` tensors: `lora_A`, `start_A` (pissa, olora), and B likewise."""
    flat: dict[str, np.ndarray[Any, Any]] = {}
    for name, arrays in adapters.trained().items():
        flat |= {f"{name}.{factor}": array for factor, array in arrays.items()}
        if start := adapters.starts.get(name):
            flat |= {f"{name}.start_A": start.a, f"{name}.start_B": start.b}
    save_file(flat, folder / FACTORS_FILE)


def load_adapters(adapters: Adapters, folder: Path) -> None:
    """Bring attached adapters to the state that was saved; starts are read, not computed again.

    Raises CheckpointError for a file that lacks a start, or holds merges that are part of the base since, and
    ModelError for factors that do not fit.
    """
    modules = grouped(read_tensors(folder / FACTORS_FILE), ".")
    trained = {
        name: {factor: array for factor, array in arrays.items() if factor.startswith("lora_")}
        for name, arrays in modules.items()
    }
    adapters.check(trained)
    for name, arrays in modules.items():
        check_pairs(arrays, folder / FACTORS_FILE)
        if "piece0_A" in arrays:
            raise _foreign(folder, f"`{name}` holds merges of restarts", "go on with --backend torch.")
        if name in adapters.starts and "start_A" not in arrays:
            raise _foreign(folder, f"`{name}` has no start")
    starts = {
        name: Start(arrays["start_A"], arrays["start_B"])
        for name, arrays in modules.items()
        if "start_A" in arrays
    }
    if starts:
        adapters.begin(starts)
    adapters.load(trained)


def _foreign(folder: Path, message: str, help: str = "") -> CheckpointError:
    return CheckpointError("foreign-checkpoint", message, where=str(folder / FACTORS_FILE), help=help)
