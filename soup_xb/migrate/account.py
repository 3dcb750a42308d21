"""The account of a migration: each key of the source file is taken once, and ends as carried over or as left."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from attrs import frozen

from soup_xb.core.config.keys import KeyRefused, read_value, safe_text, shown
from soup_xb.core.config.schema import KEYS
from soup_xb.core.config.yaml import MOST_VALUES, Node, read_yaml
from soup_xb.core.errors import ConfigError
from soup_xb.core.tasks import TASKS

Convert = Callable[[Any], Any]
Reasons = Iterable[tuple[str, str]]


class NotCarriedError(ValueError):
    """A value that has no counterpart; the text says why."""


class NoSuchTaskError(NotCarriedError):
    """A task that cannot be trained for: without it the config would be another one."""


@frozen
class Carried:
    """A key that became ours. `to` is empty where soup-xb always does what the value asks for."""

    key: str
    line: int
    to: str
    value: Any
    note: str = ""


@frozen
class Added:
    """A key that the source does not write, and whose default differs between the tools."""

    key: str
    value: Any
    reason: str


@frozen
class Left:
    """A key that is not carried over, and why."""

    key: str
    line: int
    reason: str


class Account:
    """The config in the making, and what became of each key."""

    def __init__(self, tool: str, source: str, entries: Mapping[str, Entry]) -> None:
        self.tool = tool
        self.source = source
        self.values: dict[str, Any] = {}
        self.carried: list[Carried] = []
        self.added: list[Added] = []
        self.left: list[Left] = []
        self._open = dict(entries)

    def peek(self, key: str) -> Any:
        """The value of a key that is not taken yet, None where there is none."""
        entry = self._open.get(key)
        return None if entry is None else entry.value

    def matching(self, pattern: str) -> list[str]:
        """The keys not taken yet whose name matches a regular expression whole."""
        return [key for key in self._open if re.fullmatch(pattern, key)]

    def carry(self, key: str, to: str, convert: Convert = lambda value: value, note: str = "") -> bool:
        """Make a key ours. A value that `convert` or our own key refuses is left, with the reason.

        Raises ConfigError for a task that is none of ours.
        """
        entry = self._take(key)
        if entry is None:
            return False
        try:
            value = convert(entry.value)
            read_value(KEYS[to], value)
        except NoSuchTaskError as error:
            where = f"{self.source}:{entry.line}: {safe_text(entry.key)}"
            help = f"the tasks here are {', '.join(TASKS)}."
            raise ConfigError("migrate-task", str(error), where=where, help=help) from error
        except NotCarriedError as error:
            return self._leave(entry, str(error))
        except KeyRefused as refused:
            return self._leave(entry, f"`{to}` {refused.message}")
        if to in self.values and self.values[to] != value:
            return self._leave(entry, f"another key has set `{to}` to {shown(self.values[to])}")
        self.values[to] = value
        self.carried.append(Carried(entry.key, entry.line, to, value, note))
        return True

    def collect(self, key: str, to: str, convert: Convert, note: str = "") -> None:
        """Make a key one or more entries of a list of ours; `convert` gives a list."""
        entry = self._take(key)
        if entry is None:
            return
        try:
            found = convert(entry.value)
            read_value(KEYS[to], found)
        except (NotCarriedError, KeyRefused) as error:
            self._leave(entry, str(error))
            return
        self.values[to] = [*self.values.get(to, []), *found]
        self.carried.append(Carried(entry.key, entry.line, to, found, note))

    def name_column(self, key: str, ours: str) -> None:
        """Make a key that names a column of the rows an entry of `data.columns`."""
        entry, to = self._take(key), "data.columns"
        if entry is None:
            return
        names = dict(self.values.get(to, {}))
        try:
            read_value(KEYS[to], {ours: entry.value})
        except KeyRefused as refused:
            self._leave(entry, f"`{to}` {refused.message}")
            return
        if names.get(ours, entry.value) != entry.value:
            self._leave(entry, f"one `{to}` serves all files, and reads `{ours}` from `{names[ours]}`")
            return
        if entry.value != ours:
            self.values[to] = {**names, ours: entry.value}
        self.carried.append(Carried(entry.key, entry.line, f"{to}.{ours}", entry.value))

    def same(self, key: str, note: str) -> None:
        """A key whose value is what always happens here."""
        entry = self._take(key)
        if entry is not None:
            self.carried.append(Carried(entry.key, entry.line, "", entry.value, note))

    def leave(self, key: str, reason: str) -> None:
        """A key that is not carried over."""
        entry = self._take(key)
        if entry is not None:
            self._leave(entry, reason)

    def add(self, key: str, value: Any, reason: str) -> None:
        """A key of ours that keeps what the tool does by default; nothing where it is set already."""
        if key not in self.values:
            self.values[key] = value
            self.added.append(Added(key, value, reason))

    def withdraw(self, to: str, reason: str) -> None:
        """Take a key of ours back: what it came from is left instead."""
        self.values.pop(to, None)
        for done in [carried for carried in self.carried if carried.to == to]:
            self.carried.remove(done)
            self.left.append(Left(done.key, done.line, reason))
        self.added = [added for added in self.added if added.key != to]

    def leave_rest(self, reasons: Reasons) -> None:
        """Leave every key that was not taken, with the reason whose pattern matches first."""
        for entry in list(self._open.values()):
            name = re.sub(r"^(training|data)\.(lora\.)?", "", entry.key)
            named = (reason for pattern, reason in reasons if re.fullmatch(pattern, name))
            self.leave(entry.key, next(named, f"soupx migrate does not know this key of {self.tool}"))

    def _take(self, key: str) -> Entry | None:
        entry = self._open.pop(key, None)
        if entry is not None and entry.value in (None, "", [], {}):
            self._leave(entry, "has no value")
            return None
        return entry

    def _leave(self, entry: Entry, reason: str) -> bool:
        self.left.append(Left(entry.key, entry.line, reason))
        return False


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
