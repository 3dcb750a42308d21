"""The adapters in a checkpoint: trained tensors, what they started from, and the pieces that merges left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from soup_xb.backends.torch.adapters import Adapters
from soup_xb.backends.torch.vera import VeraAdapters
from soup_xb.core.adapter.pieces import Piece
from soup_xb.core.adapter.starts import Start
from soup_xb.core.errors import CheckpointError
from soup_xb.core.run.checkpoint import check_pairs, grouped, read_tensors

FACTORS_FILE = "factors.safetensors"
Arrays = dict[str, np.ndarray[Any, Any]]


def save_adapters(adapters: Adapters | VeraAdapters, folder: Path) -> None:
    """Write `module.factor` tensors: `lora_A`, `start_A` (pissa, olora), `piece0_A` (merges), and B likewise.

    Of VeRA the vectors and, without a module's name, the projections.
    """
    modules = adapters.factors() if isinstance(adapters, VeraAdapters) else _lora_modules(adapters)
    flat = {f"{name}.{part}": array for name, arrays in modules.items() for part, array in arrays.items()}
    save_file(flat, folder / FACTORS_FILE)


def load_adapters(adapters: Adapters | VeraAdapters, folder: Path) -> None:
    """Bring freshly attached adapters, and the base under them, to the state that was saved.

    Starts are read, not computed again, and pieces are folded in one after the other, as they were: the weights
    come out with the same bytes. Raises CheckpointError for a file that does not fit.
    """
    if isinstance(adapters, VeraAdapters):
        adapters.load(grouped(read_tensors(folder / FACTORS_FILE), "."))
        return
    if any(adapters.pieces.values()):
        raise RuntimeError("a checkpoint is loaded onto a base without merges; open it anew")
    modules = grouped(read_tensors(folder / FACTORS_FILE), ".")
    trained = {
        name: {factor: array for factor, array in arrays.items() if re.match("lora_", factor)}
        for name, arrays in modules.items()
    }
    adapters.load(trained)
    for name in trained:
        check_pairs(modules[name], folder / FACTORS_FILE)
        pieces = _pieces(modules[name])
        start = _start(modules[name])
        if start is None and not pieces and name in adapters.starts:
            raise _foreign(folder, f"`{name}` has no start")
        for piece in pieces:
            adapters.fold(name, piece)
        adapters.begin(name, trained[name]["lora_A"], trained[name]["lora_B"], start)


def _lora_modules(adapters: Adapters) -> dict[str, Arrays]:
    modules = adapters.trained()
    for name, arrays in modules.items():
        if start := adapters.starts.get(name):
            arrays |= {"start_A": start.a, "start_B": start.b}
        for index, piece in enumerate(adapters.pieces[name]):
            arrays |= {f"piece{index}_A": piece.a, f"piece{index}_B": piece.b}
    return modules


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
