"""YAML text <-> plain values: read with line numbers and without surprises, written so that it reads back the same.

One document; no tags, anchors, aliases, directives or duplicate keys; scalars by YAML 1.2 (`no` is text,
`012` is 12, `2e-4` and `1_000` are numbers). Aliases are allowed if another tool's file is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen
from ruamel.yaml import YAML
from ruamel.yaml import events as yaml_events
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode

from soup_xb.core.errors import ConfigError, Problem, ResourceError
from soup_xb.core.text import did_you_mean

DEEPEST = 32
# More values than any config holds; it bounds the time that a file of 256 KiB can take.
MOST_VALUES = 5_000

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
# A directive could bring YAML 1.1 back, where `no` is false; ruamel.yaml acts on it before the first event.
_DIRECTIVE = re.compile(r"^\ufeff?%[A-Z]", re.MULTILINE)
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")}


@frozen
class Node:
    """A value and the line (from 1) that it begins on: a scalar, a list of nodes, or a mapping to nodes.

    `lines` has the line of each key of a mapping. A key is its text as written, whatever type it looks like.
    """

    value: Any
    line: int
    lines: dict[str, int] = field(factory=dict)

    def plain(self) -> Any:
        """The value without line numbers."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def read_yaml(text: str, source: str, aliases: bool = False) -> tuple[Node | None, list[Problem]]:
    """The tree of `text` (None where the text holds no value at all), and a problem for each duplicate key.

    With `aliases` the tree has the anchored value in the place of each alias, whose values count again.
    Raises ConfigError that names `source` and line for everything that is not plain YAML.
    """
    _refuse_unwanted_text(text, source)
    try:
        reader = _TreeReader(text, source, aliases)
        return reader.read(), reader.duplicates
    except MarkedYAMLError as error:
        raise ConfigError.of([syntax_problem(error, source)]) from error
    except (YAMLError, ValueError, OverflowError) as error:
        # ruamel.yaml lets through what chr() says of an escape such as "\UFFFFFFFF".
        help = "check what follows each backslash in double quotes."
        raise ConfigError("yaml-syntax", "an escape names no character", where=source, help=help) from error


def _refuse_unwanted_text(text: str, source: str) -> None:
    stray, directive = _CONTROL.search(text), _DIRECTIVE.search(text)
    if stray:
        line, column = (
            text.count("\n", 0, stray.start()) + 1,
            stray.start() - text.rfind("\n", 0, stray.start()),
        )
        message = f"line {line}, column {column}: the control character U+{ord(stray[0]):04X} is not allowed"
        raise ConfigError("control-character", message, where=f"{source}:{line}", help="delete it.")
    if directive:
        where = f"{source}:{text.count(chr(10), 0, directive.start()) + 1}"
        raise ConfigError("yaml-directive", "a `%` directive is not allowed", where=where, help="delete it.")


class _TreeReader:
    """Builds the tree from the event stream, so that depth and size are known before anything recurses."""

    def __init__(self, text: str, source: str, aliases: bool) -> None:
        yaml = YAML(typ="safe", pure=True)
        self._events: Iterator[Any] = iter(yaml.parse(text))
        self._yaml = yaml
        self._source = source
        self._aliases = aliases
        self._anchored: dict[str, Node] = {}
        self._count = 0
        self.duplicates: list[Problem] = []

    def read(self) -> Node | None:
        root: Node | None = None
        documents = 0
        for event in self._events:
            if isinstance(event, yaml_events.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._refused(
                        event, "yaml-documents", "a second document begins", "keep one a file."
                    )
                if event.version or event.tags:
                    raise self._refused(
                        event, "yaml-directive", "a `%` directive is not allowed", "delete it."
                    )
            elif isinstance(event, yaml_events.NodeEvent):
                root = self._node(event, 1)
        return root

    def _node(self, event: Any, depth: int) -> Node:
        self._check(event, depth)
        if isinstance(event, yaml_events.AliasEvent):
            return self._aliased(event, depth)
        line = event.start_mark.line + 1
        if isinstance(event, yaml_events.ScalarEvent):
            node = Node(self._scalar(event), line)
        elif isinstance(event, yaml_events.SequenceStartEvent):
            node = Node(self._entries(depth), line)
        else:
            node = self._mapping(line, depth)
        # Known only once it is whole, so that no value can hold itself.
        if event.anchor:
            self._anchored[event.anchor] = node
        return node

    def _aliased(self, event: Any, depth: int) -> Node:
        node = self._anchored.get(event.anchor)
        if node is None:
            message = f"the alias `*{_short(event.anchor)}` stands for nothing"
            raise self._refused(event, "yaml-alias", message, "an anchor, `&name`, comes before its aliases.")
        self._count_again(event, node, depth)
        return node

    def _count_again(self, event: Any, node: Node, depth: int) -> None:
        """Hold a value that stands in another place to the same limits as if it were written there."""
        below = node.value.values() if isinstance(node.value, dict) else node.value
        for entry in below if isinstance(node.value, (dict, list)) else ():
            self._limit(event, depth + 1)
            self._count_again(event, entry, depth + 1)

    def _entries(self, depth: int) -> list[Node]:
        entries = []
        while not isinstance(event := next(self._events), yaml_events.SequenceEndEvent):
            entries.append(self._node(event, depth + 1))
        return entries

    def _mapping(self, line: int, depth: int) -> Node:
        values: dict[str, Node] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self._events), yaml_events.MappingEndEvent):
            self._check(event, depth)
            if not isinstance(event, yaml_events.ScalarEvent):
                raise self._refused(event, "yaml-key", "a key must be text", "write `key: value`.")
            key, key_line = event.value, event.start_mark.line + 1
            if key in values:
                message = f"`{_short(key)}` is given twice: lines {lines[key]} and {key_line}"
                where = f"{self._source}:{key_line}"
                self.duplicates.append(Problem("duplicate-key", message, where, "keep one of them."))
            values[key] = self._node(next(self._events), depth + 1)
            lines[key] = key_line
        return Node(values, line, lines)

    def _check(self, event: Any, depth: int) -> None:
        self._limit(event, depth)
        if not self._aliases and (
            isinstance(event, yaml_events.AliasEvent) or getattr(event, "anchor", None)
        ):
            sign = "*" if isinstance(event, yaml_events.AliasEvent) else "&"
            message = (
                f"an {'alias' if sign == '*' else 'anchor'} (`{sign}{_short(event.anchor)}`) is not allowed"
            )
            raise self._refused(
                event, "yaml-alias", message, "write the value out; quote a text that begins so."
            )
        if getattr(event, "tag", None):
            message = f"a tag (`{_short(str(event.tag))}`) is not allowed"
            raise self._refused(event, "yaml-tag", message, "delete it; quote a text that begins with `!`.")

    def _limit(self, event: Any, depth: int) -> None:
        self._count += 1
        if depth > DEEPEST:
            message = f"nested more than {DEEPEST} deep"
            raise self._refused(event, "yaml-too-deep", message, "a config is at most four deep.")
        if self._count > MOST_VALUES:
            message = f"more than {MOST_VALUES} values"
            raise self._refused(event, "config-too-large", message, "name a folder's files by fewer entries.")

    def _scalar(self, event: Any) -> Any:
        if event.implicit[0]:
            tag = self._yaml.resolver.resolve(ScalarNode, event.value, event.implicit)
            if str(tag) in _PLAIN_TAGS:
                try:
                    return self._yaml.constructor.construct_object(ScalarNode(str(tag), event.value))
                except ValueError:
                    # `-_` and an integer of 5,000 digits look like numbers to the resolver.
                    return event.value
        return event.value

    def _refused(self, event: Any, code: str, message: str, help: str) -> ConfigError:
        return ConfigError(code, message, where=f"{self._source}:{event.start_mark.line + 1}", help=help)


def _short(name: str) -> str:
    return (name if len(name) <= 40 else name[:39] + "…").encode("unicode_escape").decode("ascii")


_BRACKETS = {"a flow sequence": "[", "a flow mapping": "{"}


def syntax_problem(error: MarkedYAMLError, source: str) -> Problem:
    """The problem behind ruamel.yaml's error, with line and column counted from 1."""
    cause = error.problem or error.context or "this is not YAML"
    context = error.context or ""
    mark = error.problem_mark or error.context_mark
    opened = error.context_mark
    message, help = _generic(cause), "a text with special characters goes in quotes."
    if r"'\t'" in cause or "\t" in cause:
        message, help = "a tab is used for indentation", "YAML indents with spaces; replace the tab."
    elif "quoted scalar" in context and "end of" in cause:
        mark, message, help = opened, "a quote is opened and never closed", "close the quote."
    elif context.removeprefix("while parsing ") in _BRACKETS:
        bracket = _BRACKETS[context.removeprefix("while parsing ")]
        mark, message = opened, f"a `{bracket}` is opened and not closed as it should be"
        help = f"separate the entries by commas and close with `{']' if bracket == '[' else '}'}`."
    elif "mapping values are not allowed" in cause:
        message = "a `:` where no key can stand"
        help = "check the indentation of this line and the one above; quote a text that holds `: `."
    elif "could not find expected ':'" in cause:
        mark, message, help = (
            opened,
            "a key without a `:`",
            "write `key: value`, with a space after the colon.",
        )
    elif "cannot start any token" in cause:
        help = "put the value in quotes."
    elif "<document start>" in cause:
        message, help = (
            "something follows the end of the config",
            "one mapping of keys is all that a config holds.",
        )
    elif "<stream end>" in cause:
        message, help = "the text ends where a value is expected", "close every bracket and quote."
    elif cause.startswith("expected the node content"):
        message = f"{cause.rpartition(' ')[2].replace(chr(39), chr(96))} where a value is expected"
        help = "delete it, or put the value in quotes."
    elif "<block end>" in cause:
        message = "a list entry, key or bracket where it does not fit"
        help = "indent the keys of one section alike; a list entry begins with `- `."
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
    return Problem("yaml-syntax", f"line {line}, column {column}: {message}", f"{source}:{line}", help)


def _generic(cause: str) -> str:
    cause = cause.replace("found character", "the character").replace("that cannot", "cannot")
    return cause.splitlines()[0][:120]


MOST_BYTES = 256 * 1024
LEAST = "a config needs at least `base:` and, below `data:`, `train:`; `soupx schema` lists every key."


def read_text(path: Path) -> str:
    """The file as text, a byte order mark left out.

    No more than 256 KiB are read. Raises ConfigError for a file that is missing, a folder, too large or not
    UTF-8, and ResourceError where it may not be read.
    """
    where = str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError("config-not-found", "no such file", where=where, help=_close_files(path)) from error
    except IsADirectoryError as error:
        help = f"name the file in it, such as `{path / 'soup.yaml'}`."
        raise ConfigError("config-is-folder", "is a folder, not a file", where=where, help=help) from error
    except PermissionError as error:
        help = "check its permissions."
        raise ResourceError("config-forbidden", "may not be read", where=where, help=help) from error
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise ConfigError("config-unreadable", message, where=where, help="name a regular file.") from error
    if len(content) > MOST_BYTES:
        message = f"larger than {MOST_BYTES // 1024} KiB"
        raise ConfigError("config-too-large", message, where=where, help="a config holds settings, not data.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{where}:{content.count(bytes([10]), 0, error.start) + 1}"
        raise ConfigError(
            "config-not-utf8", "not UTF-8 text", where=where, help="save it as UTF-8."
        ) from error


def _close_files(path: Path) -> str:
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
    except OSError:
        names = []
    return did_you_mean(path.name[:100], names[:100]) or f"create it, or name another file; {LEAST}"


_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+-]*")
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n", ".inf", ".nan", "..."}
# YAML reads a key of more than 1,024 characters only in its long form.
_LONGEST_SHORT_KEY = 128


def write_yaml(values: Mapping[str, Any], indent: str = "") -> str:
    r"""Nested mappings as indented blocks, everything else on one line.

    >>> print(write_yaml({"base": "tiny", "data": {"train": ["a.jsonl"], "eval": []}}), end="")
    base: tiny
    data:
      train: [a.jsonl]
      eval: []
    """
    lines = []
    for name, value in values.items():
        key = _scalar(name)
        start = f"{indent}{key}:" if len(key) <= _LONGEST_SHORT_KEY else f"{indent}? {key}\n{indent}:"
        if isinstance(value, Mapping) and value:
            lines.append(f"{start}\n{write_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{start} {_inline(value)}\n")
    return "".join(lines)


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_scalar(entry) for entry in value)}]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS and not value.startswith("..."):
        return value
    return "".join(
        char if char.isprintable() else _escape(char) for char in json.dumps(value, ensure_ascii=False)
    )


def _escape(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
