"""The adapters in a checkpoint: trained tensors, what they started from, and the pieces that merges left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from soup_xb.backends.torch.adapters import Adapters
from soup_xb.core.errors import CheckpointError
from soup_xb.core.pieces import Piece
from soup_xb.core.starts import Start
from soup_xb.core.state_file import grouped, read_tensors

FACTORS_FILE = "factors.safetensors"
Arrays = dict[str, np.ndarray[Any, Any]]


def save_adapters(adapters: Adapters, folder: Path) -> None:
    """Write `module.factor` tensors: `lora_A`, `start_A` (pissa, olora), `piece0_A` (merges), and B likewise."""
    flat: Arrays = {}
    for name, arrays in adapters.trained().items():
        flat |= {f"{name}.{factor}": array for factor, array in arrays.items()}
        if start := adapters.starts.get(name):
            flat |= {f"{name}.start_A": start.a, f"{name}.start_B": start.b}
        for index, piece in enumerate(adapters.pieces[name]):
            flat |= {f"{name}.piece{index}_A": piece.a, f"{name}.piece{index}_B": piece.b}
    save_file(flat, folder / FACTORS_FILE)


def load_adapters(adapters: Adapters, folder: Path) -> None:
    """Bring freshly attached adapters, and the base under them, to the state that was saved.

    Starts are read, not computed again, and pieces are folded in one after the other, as they were: the weights
    come out with the same bytes. Raises CheckpointError for a file that does not fit.
    """
    if any(adapters.pieces.values()):
        raise RuntimeError("a checkpoint is loaded onto a base without merges; open it anew")
    modules = grouped(read_tensors(folder / FACTORS_FILE), ".")
    trained = {
        name: {factor: array for factor, array in arrays.items() if re.match("lora_", factor)}
        for name, arrays in modules.items()
    }
    adapters.load(trained)
    for name in trained:
        pieces = _pieces(modules[name])
        start = _start(modules[name])
        if start is None and not pieces and name in adapters.starts:
            raise _foreign(folder, f"`{name}` has no start")
        for piece in pieces:
            adapters.fold(name, piece)
        adapters.begin(name, trained[name]["lora_A"], trained[name]["lora_B"], start)


def _start(arrays: Arrays) -> Start | None:
    return Start(arrays["start_A"], arrays["start_B"]) if "start_A" in arrays else None


def _pieces(arrays: Arrays) -> list[Piece]:
    pieces: list[Piece] = []
    while f"piece{len(pieces)}_A" in arrays:
        index = len(pieces)
        pieces.append(Piece(arrays[f"piece{index}_A"], arrays[f"piece{index}_B"]))
    return pieces


def _foreign(folder: Path, message: str) -> CheckpointError:
    return CheckpointError("foreign-checkpoint", message, where=str(folder / FACTORS_FILE))
