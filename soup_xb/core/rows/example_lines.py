"""Examples as JSON and back, for a process that tokenizes them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs

from soup_xb.core.rows import examples
from soup_xb.core.rows.examples import AnyExample

# Every class of core.rows.examples that says what a row means; their values are texts, numbers, marks and tuples of
# these.
_CLASSES: Mapping[str, type] = MappingProxyType(
    {name: value for name, value in vars(examples).items() if isinstance(value, type) and attrs.has(value)}
)
_FIELDS = {name: tuple(field.name for field in attrs.fields(value)) for name, value in _CLASSES.items()}


def plain(value: Any) -> Any:
    """An example, or a value in it, as JSON has it: an object of a class is its name and its values.

    >>> plain(examples.Message("user", "Hi"))
    {'is': 'Message', 'values': ['user', 'Hi', [], '', '', [], '', 1.0]}
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    name = type(value).__name__
    if name not in _FIELDS:
        raise TypeError(f"an example holds a {name}, which has no form in JSON")
    return {"is": name, "values": [plain(getattr(value, field)) for field in _FIELDS[name]]}


def example_of(value: Any) -> Any:
    """The example, or the value in it, that `plain` made this of."""
    if isinstance(value, list):
        return tuple(example_of(item) for item in value)
    if isinstance(value, dict):
        return _CLASSES[value["is"]](*(example_of(item) for item in value["values"]))
    return value


def travels(example: AnyExample) -> bool:
    """Whether examples of this kind have a form in JSON."""
    try:
        plain(example)
    except TypeError:
        return False
    return True
