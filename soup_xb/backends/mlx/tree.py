"""Finding and exchanging the modules of an MLX model by their dotted names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.nn as nn


def walk(module: Any, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its dotted name, in the order in which the model declares them."""
    if isinstance(module, nn.Module):
        if name:
            yield name, module
        children: Any = module.children().items()
    elif isinstance(module, dict):
        children = module.items()
    elif isinstance(module, list | tuple):
        children = enumerate(module)
    else:
        return
    for key, child in children:
        yield from walk(child, f"{name}.{key}" if name else str(key))


def submodule(model: nn.Module, name: str) -> Any:
    """The module of that name."""
    module: Any = model
    for part in name.split("."):
        module = module[int(part)] if isinstance(module, list | tuple) else module[part]
    return module


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module of that name."""
    parent, _, last = name.rpartition(".")
    owner = submodule(model, parent) if parent else model
    if isinstance(owner, list):
        owner[int(last)] = new
    else:
        setattr(owner, last, new)
