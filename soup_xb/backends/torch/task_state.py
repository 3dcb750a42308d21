"""What a task carries from step to step besides the adapter, as a file of a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from soup_xb.core.errors import CheckpointError
from soup_xb.core.run.checkpoint import read_tensors

STATE_FILE = "task.json"
PARAMETERS_FILE = "task.safetensors"


def save_task_state(state: Mapping[str, float], folder: Path) -> None:
    """Write the numbers of a task that has any; most tasks have none and no file."""
    if state:
        (folder / STATE_FILE).write_text(json.dumps(dict(state), indent=2, sort_keys=True) + "\n", "utf-8")


def save_parameters(parameters: Mapping[str, torch.nn.Parameter], folder: Path) -> None:
    """Write what a task trains beside the adapter; most tasks train nothing and have no file."""
    if parameters:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
        save_file(tensors, folder / PARAMETERS_FILE)


def load_parameters(parameters: Mapping[str, torch.nn.Parameter], folder: Path) -> None:
    """Read back what `save_parameters` wrote. Raises CheckpointError where it does not fit."""
    if not parameters:
        return
    file = folder / PARAMETERS_FILE
    found = read_tensors(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if {name: array.shape for name, array in found.items()} != shapes:
        raise CheckpointError("foreign-checkpoint", "is not the state of this task", where=str(file))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(found[name]))


def load_task_state(expected: Mapping[str, float], folder: Path) -> Mapping[str, float]:
    """Read back what `save_task_state` wrote; `expected` has the names. Raises CheckpointError where it differs."""
    if not expected:
        return {}
    file = folder / STATE_FILE
    try:
        state = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("checkpoint-damaged", f"cannot be read: {error}", where=str(file)) from error
    whole = isinstance(state, dict) and state.keys() == expected.keys()
    if not whole or not all(isinstance(value, float) and math.isfinite(value) for value in state.values()):
        raise CheckpointError("foreign-checkpoint", "is not the state of this task", where=str(file))
    return {str(name): float(value) for name, value in state.items()}
