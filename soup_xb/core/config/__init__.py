"""The config: its keys, how it is read, and what is checked before anything loads."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Hidden from type checkers, for which a module with this function has every attribute one can think of.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """`TEMPLATES`, the older place of the starter configs: a view of the registry, with a warning.

        The registry reads configs, so it is imported by its name when it is asked for.
        """
        if name != "TEMPLATES":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module("soup_xb.core.templates").deprecated_view()
