"""`--set key=value`: values from the command line laid over the file."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import evolve, frozen

from soup_xb.core.config.loaded import COMMAND_LINE
from soup_xb.core.config.schema import KEYS
from soup_xb.core.config.yaml import Node, read_yaml
from soup_xb.core.errors import ConfigError, Problem
from soup_xb.core.keys.config_values import safe_text
from soup_xb.core.keys.unknown_keys import suggestion

_HOW = "write it as `--set training.lr=1e-4`; the value `null` is the default."


@frozen
class Override:
    """One `--set`: a dotted key of the config and its value; the value None is the default."""

    key: str
    node: Node


def read_overrides(texts: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """The overrides in their order, and a problem for each that cannot be read."""
    overrides: list[Override] = []
    problems: list[Problem] = []
    for text in texts:
        try:
            overrides.append(_read_override(text))
        except ConfigError as error:
            problems.extend(error.problems)
    return overrides, problems


def lay_over(root: Node, overrides: Sequence[Override]) -> Node:
    """The tree with every override in it; where the file has no section for a key, one is made."""
    for override in overrides:
        root = _with_value(root, override.key.split("."), override.node)
    return root


def _read_override(text: str) -> Override:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or not value.strip():
        raise ConfigError(
            "override", f"`--set {safe_text(text)}` is not key=value", where=COMMAND_LINE, help=_HOW
        )
    where = f"{COMMAND_LINE}: {safe_text(key)}"
    if key not in KEYS:
        section, _, name = key.rpartition(".")
        raise ConfigError(
            "unknown-key", "no such key", where=where, help=suggestion(name, section, dotted=True)
        )
    if KEYS[key].section is not None:
        raise ConfigError(
            "override", "is a section", where=where, help=f"set its keys, such as `{key}.{_first(key)}`."
        )
    try:
        node, problems = read_yaml(value, COMMAND_LINE)
    except ConfigError as error:
        problems = list(error.problems)
        node = None
    if problems:
        raise ConfigError.of(evolve(problem, where=where) for problem in problems)
    return Override(key, _without_lines(node) if node else Node(None, 0))


def _first(section: str) -> str:
    return next(key for key in KEYS if key.startswith(f"{section}.")).removeprefix(f"{section}.")


def _without_lines(node: Node) -> Node:
    if isinstance(node.value, dict):
        entries = {key: _without_lines(entry) for key, entry in node.value.items()}
        return Node(entries, 0, dict.fromkeys(entries, 0))
    if isinstance(node.value, list):
        return Node([_without_lines(entry) for entry in node.value], 0)
    return Node(node.value, 0)


def _with_value(node: Node, path: Sequence[str], value: Node) -> Node:
    """A copy of the mapping with `value` at `path`; a null takes the key out, which leaves its default."""
    name, rest = path[0], path[1:]
    values, lines = dict(node.value), dict(node.lines)
    below = values.get(name)
    if rest:
        if below is not None and below.value is not None and not isinstance(below.value, dict):
            # The file says something else than a section here, and that is reported.
            return node
        if below is None or below.value is None:
            below = Node({}, 0)
            lines.setdefault(name, 0)
        values[name] = _with_value(below, rest, value)
    elif value.value is None:
        values.pop(name, None)
        lines.pop(name, None)
    else:
        values[name], lines[name] = value, 0
    return Node(values, node.line, lines)
