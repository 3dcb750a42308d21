"""The keys of another tool's YAML file, each with its line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import frozen

from soup_xb.core.config.keys import shown
from soup_xb.core.config.yaml import MOST_VALUES, Node, read_yaml
from soup_xb.core.errors import ConfigError

_MERGE = "<<"


@frozen
class Entry:
    """One key of the file by its dotted name, such as `datasets[0].path`, with its value and line (from 1)."""

    key: str
    value: Any
    line: int


def read_source(text: str, source: str) -> Node:
    """The mapping that the file holds, aliases and merge keys (`<<`) resolved.

    Raises ConfigError for a text that is no plain YAML, not a mapping, or gives a key twice.
    """
    root, problems = read_yaml(text, source, aliases=True)
    if problems:
        raise ConfigError.of(problems)
    if root is None or not isinstance(root.value, dict):
        found = "nothing" if root is None else shown(root.plain())
        raise ConfigError("not-a-mapping", f"must be a mapping of keys, got {found}", where=source)
    return _merged(root, source)


def entries(root: Node, whole: tuple[str, ...] = ()) -> dict[str, Entry]:
    """Every key that has no keys below it, by its dotted name; a mapping named in `whole` is one value."""
    found: dict[str, Entry] = {}
    for entry in _entries(root, "", whole):
        # A key may be spelled like the path to another; both are told.
        key = entry.key
        while key in found:
            key += "'"
        found[key] = Entry(key, entry.value, entry.line)
        if len(found) > MOST_VALUES:
            raise ConfigError("config-too-large", f"more than {MOST_VALUES} keys")
    return found


def _entries(node: Node, prefix: str, whole: tuple[str, ...]) -> Iterator[Entry]:
    for name, value in node.value.items():
        key, line = f"{prefix}{name}", node.lines[name]
        if isinstance(value.value, dict) and value.value and key not in whole:
            yield from _entries(value, f"{key}.", whole)
        elif isinstance(value.value, list) and any(isinstance(item.value, dict) for item in value.value):
            for index, item in enumerate(value.value):
                if isinstance(item.value, dict) and item.value:
                    yield from _entries(item, f"{key}[{index}].", whole)
                else:
                    yield Entry(f"{key}[{index}]", item.plain(), item.line)
        else:
            yield Entry(key, value.plain(), line)


def _merged(node: Node, source: str) -> Node:
    """The tree with the keys of `<<` put where they are missing; what the mapping itself writes wins."""
    if isinstance(node.value, list):
        return Node([_merged(item, source) for item in node.value], node.line)
    if not isinstance(node.value, dict):
        return node
    values = {name: _merged(value, source) for name, value in node.value.items() if name != _MERGE}
    lines = {name: node.lines[name] for name in values}
    if _MERGE in node.value:
        below = _merged(node.value[_MERGE], source)
        for mapping in below.value if isinstance(below.value, list) else [below]:
            if not isinstance(mapping.value, dict):
                where = f"{source}:{node.lines[_MERGE]}"
                raise ConfigError("yaml-merge", "`<<` needs a mapping, or a list of them", where=where)
            for name, value in mapping.value.items():
                if name not in values:
                    values[name], lines[name] = value, mapping.lines[name]
    return Node(values, node.line, lines)
