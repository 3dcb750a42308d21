"""Gradient checkpointing: a block keeps its input and computes the rest again on the way back."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


class CheckpointedBlocks:
    """Blocks that run checkpointed until `undo`: their objects get a class of their own, mlx-lm's stays as it is."""

    def __init__(self, blocks: list[Any]) -> None:
        """Change the blocks."""
        self._blocks = [(block, type(block)) for block in blocks]
        classes = {cls: _checkpointed(cls) for _, cls in self._blocks}
        for block, cls in self._blocks:
            block.__class__ = classes[cls]

    def undo(self) -> None:
        """Give the blocks their class back."""
        for block, cls in self._blocks:
            block.__class__ = cls


def _checkpointed(cls: type[Any]) -> type[Any]:
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        # What a gradient is wanted of has to be an argument; everything else is a constant to MLX.
        def inner(values: Any, *arguments: Any) -> Any:
            self.update(values)
            return cls.__call__(self, *arguments, **named)

        return mx.checkpoint(inner)(self.trainable_parameters(), *arguments)

    return type(f"Checkpointed{cls.__name__}", (cls,), {"__call__": call})
