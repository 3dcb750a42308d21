"""How a config key is declared, in attrs field metadata, and how its value is read.

A value must have the declared type and lie in its range; anything else is refused with the reason.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from attrs import NOTHING, Attribute, field, frozen

from soup_xb.core.text import did_you_mean, holds_token, masked, printable

Kind = Literal[
    "integer", "number", "boolean", "text", "choice", "paths", "targets", "ranks", "names", "section"
]

_METADATA = "soup_xb.key"


@frozen
class Range:
    """The numbers that a key takes. `above` leaves `low` itself out, `below` leaves `high` itself out."""

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        if self.low is not None and (value < self.low or (self.above and value == self.low)):
            return False
        return self.high is None or value < self.high or (value == self.high and not self.below)

    def __str__(self) -> str:
        """The range in words.

        >>> str(Range(1, 1024)), str(Range(0, 1, above=True, below=True)), str(Range(1))
        ('1 to 1024', 'above 0 and below 1', 'at least 1')
        """
        if self.low is not None and self.high is not None and not (self.above or self.below):
            return f"{_digits(self.low)} to {_digits(self.high)}"
        low = f"{'above' if self.above else 'at least'} {_digits(self.low)}" if self.low is not None else ""
        high = f"{'below' if self.below else 'at most'} {_digits(self.high)}" if self.high is not None else ""
        return " and ".join(part for part in (low, high) if part)


@frozen
class Key:
    """One key of the config, declared once; checks, schema and reference page all read this.

    `default` is NOTHING where the key must be written. `optional` keys take null. `section` is the class of
    the keys below, for the kind `section`.
    """

    kind: Kind
    meaning: str
    default: Any = NOTHING
    choices: tuple[str, ...] = ()
    range: Range = Range()
    optional: bool = False
    section: type | None = None

    @property
    def required(self) -> bool:
        """Whether the file must write the key."""
        return self.default is NOTHING


def key_of(attribute: Attribute[Any]) -> Key:
    """The declaration behind an attrs attribute of a config class."""
    key: Key = attribute.metadata[_METADATA]
    return key


def integer(default: int | None, meaning: str, low: int = 1, high: int | None = None) -> Any:
    """A whole number; with the default None it is optional."""
    return _declare(Key("integer", meaning, default, range=Range(low, high), optional=default is None))


def number(default: float | None, meaning: str, range: Range) -> Any:
    """A finite decimal number; with the default None it is optional."""
    return _declare(Key("number", meaning, default, range=range, optional=default is None))


def switch(default: bool, meaning: str) -> Any:
    """True or false."""
    return _declare(Key("boolean", meaning, default))


def choice(default: str, choices: tuple[str, ...], meaning: str) -> Any:
    """One of a few words."""
    return _declare(Key("choice", meaning, default, choices=choices))


def text(default: Any, meaning: str) -> Any:
    """One piece of text; required with the default NOTHING, optional with None."""
    return _declare(Key("text", meaning, default, optional=default is None))


def paths(default: Any, meaning: str) -> Any:
    """One path or a list of them, held as a tuple."""
    return _declare(Key("paths", meaning, default, optional=default == ()), _tuple_of_paths)


def targets(default: str, choices: tuple[str, ...], meaning: str) -> Any:
    """A word from `choices`, one pattern, or a list of patterns."""
    return _declare(Key("targets", meaning, default, choices=choices), _one_or_tuple)


def ranks(meaning: str) -> Any:
    """A map from module pattern to a whole number, empty by default; the first key that matches decides."""
    key = Key("ranks", meaning, MappingProxyType({}), range=Range(1, 1024))
    return _declare(key, lambda entries: MappingProxyType(dict(entries)))


def names(meaning: str) -> Any:
    """A map from one name to another, empty by default."""
    key = Key("names", meaning, MappingProxyType({}))
    return _declare(key, lambda entries: MappingProxyType(dict(entries)))


def section(of: type, meaning: str, required: bool = False) -> dict[str, Key]:
    """The metadata of an attribute that holds further keys; its class declares them."""
    return {_METADATA: Key("section", meaning, NOTHING if required else None, section=of)}


def _declare(key: Key, converter: Any = None) -> Any:
    return field(default=key.default, converter=converter, validator=_holds, metadata={_METADATA: key})


def _holds(instance: object, attribute: Attribute[Any], value: Any) -> None:
    """Keep a config that code builds within what a file could say; files get their own wording."""
    key = key_of(attribute)
    if value is None and key.optional:
        return
    if key.kind == "choice" and value not in key.choices:
        raise ValueError(f"{attribute.name} must be one of {', '.join(key.choices)}, got {value!r}")
    if key.kind not in ("integer", "number", "ranks"):
        return
    for entry in value.values() if key.kind == "ranks" else (value,):
        if not key.range.holds(entry):
            raise ValueError(f"{attribute.name} must be {key.range}, got {entry!r}")


def _tuple_of_paths(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _one_or_tuple(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def _digits(value: float | None) -> str:
    return f"{value:.10g}" if value is not None else ""


def declared(cls: type, prefix: str = "") -> Mapping[str, Key]:
    """Every key of a config class by its dotted name, sections before the keys below them."""
    keys: dict[str, Key] = {}
    for attribute in cls.__attrs_attrs__:  # type: ignore[attr-defined]
        key = key_of(attribute)
        keys[prefix + attribute.name] = key
        if key.section is not None:
            keys.update(declared(key.section, f"{prefix}{attribute.name}."))
    return keys


MOST_PATTERNS = 256
LONGEST_PATTERN = 1000
_MOST_NAMES = 64
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class KeyRefused(ValueError):  # noqa: N818 - a refusal is what the house calls it
    """A value that its key does not take; `code`, `message` and `help` go into a Problem."""

    def __init__(self, code: str, message: str, help: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.help = help


def read_value(key: Key, raw: Any) -> Any:
    """The value of `key` from plain YAML. Raises KeyRefused."""
    if raw is None:
        if key.optional:
            return key.default
        default = "" if key.required else f", or remove the key for its default ({shown(key.default)})"
        raise KeyRefused("missing-value", "has no value", f"write one{default}.")
    return _READERS[key.kind](key, raw)


def shown(value: Any) -> str:
    """A value as YAML would write it, shortened, without control characters and without access tokens.

    >>> shown(True), shown("4"), shown({"a": 1}), shown(None)
    ('true', '"4"', 'a mapping', 'null')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    if isinstance(value, str):
        return f'"{safe_text(value)}"'
    return str(value) if abs(value) < 10**15 else "a very large number"


def safe_text(text: str) -> str:
    """Text from a file, fit for a terminal: short, printable, access tokens replaced."""
    text = masked(text[:200])
    return printable(text if len(text) <= 60 else text[:59] + "…")


def _integer(key: Key, raw: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int):
        help = "write it without quotes." if isinstance(raw, str) and _NUMBER.fullmatch(raw) else ""
        raise KeyRefused("wrong-type", f"must be an integer, got {shown(raw)}", help)
    _within(key, raw)
    return raw


def _number(key: Key, raw: Any) -> float:
    if isinstance(raw, str) and _NUMBER.fullmatch(raw):
        raw = float(raw)
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        raise KeyRefused("wrong-type", f"must be a number, got {shown(raw)}")
    if isinstance(raw, float) and not math.isfinite(raw):
        raise KeyRefused("not-finite", f"must be a finite number, got {raw}")
    _within(key, raw)
    return float(raw)


def _within(key: Key, value: float) -> None:
    if not key.range.holds(value):
        raise KeyRefused("out-of-range", f"must be {key.range}, got {shown(value)}")


def _boolean(key: Key, raw: Any) -> bool:
    if not isinstance(raw, bool):
        raise KeyRefused("wrong-type", f"must be true or false, got {shown(raw)}")
    return raw


def _text(key: Key, raw: Any) -> str:
    if not isinstance(raw, str):
        help = "put it in quotes." if isinstance(raw, (bool, int, float)) else ""
        raise KeyRefused("wrong-type", f"must be text, got {shown(raw)}", help)
    if not raw.strip():
        raise KeyRefused("empty-value", "must not be empty")
    # A surrogate cannot be written to any file; a NUL or an escape has no place in a path or a template.
    stray = next(
        (char for char in raw if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t"), None
    )
    if stray is not None:
        raise KeyRefused("control-character", f"holds the character U+{ord(stray):04X}", "delete it.")
    # Every run writes its config into several files that are made to be shared.
    if holds_token(raw):
        raise KeyRefused(
            "access-token",
            "holds what looks like an access token",
            "take it out; log in with `hf auth login`.",
        )
    return raw


def _path(key: Key, raw: Any) -> str:
    path = _text(key, raw)
    if "\n" in path or "\t" in path:
        raise KeyRefused(
            "control-character", f"holds a line break or a tab: {shown(path)}", "write it on one line."
        )
    return path


def _choice(key: Key, raw: Any) -> str:
    if isinstance(raw, str) and raw in key.choices:
        return raw
    guess = raw.lower() if isinstance(raw, str) else str(raw).lower()
    message = f"must be one of {', '.join(key.choices)}, got {shown(raw)}"
    near = (guess,) if guess in key.choices else key.choices
    raise KeyRefused("unknown-choice", message, did_you_mean(guess[:60], near))


def _paths(key: Key, raw: Any) -> tuple[str, ...]:
    if isinstance(raw, list) and (raw or not key.required):
        return _each(key, raw, _path)
    if isinstance(raw, str):
        return (_path(key, raw),)
    raise KeyRefused("wrong-type", f"must be a path or a list of paths, got {shown(raw)}")


def _targets(key: Key, raw: Any) -> str | tuple[str, ...]:
    if isinstance(raw, str):
        return _pattern(key, raw)
    if isinstance(raw, list) and raw:
        words = [entry for entry in raw if entry in key.choices]
        if words:
            raise KeyRefused(
                "wrong-type", f"`{words[0]}` stands alone, not in a list", f"write `{words[0]}`."
            )
        return _each(key, raw, _pattern)
    raise KeyRefused("wrong-type", f"must be `auto`, a pattern or a list of patterns, got {shown(raw)}")


def _each(key: Key, raw: list[Any], read: Callable[[Key, Any], str]) -> tuple[str, ...]:
    entries = []
    for position, entry in enumerate(raw, start=1):
        try:
            entries.append(read(key, entry))
        except KeyRefused as refusal:
            raise KeyRefused(refusal.code, f"entry {position} {refusal.message}", refusal.help) from None
    return tuple(entries)


def _pattern(key: Key, raw: Any) -> str:
    if isinstance(raw, str) and (not raw.strip() or "\0" in raw):
        what = "holds a NUL character" if "\0" in raw else "is empty"
        raise KeyRefused(
            "bad-pattern", f"is no module pattern: it {what}", "name a module, such as `q_proj`."
        )
    if isinstance(raw, str) and len(raw) > LONGEST_PATTERN:
        raise KeyRefused(
            "bad-pattern", f"is a pattern of {len(raw)} characters, at most {LONGEST_PATTERN} are allowed"
        )
    return _path(key, raw)


def _ranks(key: Key, raw: Any) -> Mapping[str, int]:
    if not isinstance(raw, Mapping):
        raise KeyRefused(
            "wrong-type",
            f"must be a mapping of pattern to integer, got {shown(raw)}",
            "write `{q_proj: 8, v_proj: 16}`.",
        )
    if len(raw) > MOST_PATTERNS:
        message = f"has {len(raw)} patterns, at most {MOST_PATTERNS} are allowed"
        raise KeyRefused("too-many-patterns", message, "let one pattern match several modules.")
    values = {}
    for pattern, value in raw.items():
        try:
            values[_pattern(key, pattern)] = _integer(key, value)
        except KeyRefused as refusal:
            message = f"`{safe_text(pattern)}` {refusal.message}"
            raise KeyRefused(refusal.code, message, refusal.help) from None
    return MappingProxyType(values)


def _names(key: Key, raw: Any) -> Mapping[str, str]:
    if not isinstance(raw, Mapping):
        help = "write `{instruction: question, output: answer}`."
        raise KeyRefused("wrong-type", f"must be a mapping of name to name, got {shown(raw)}", help)
    if len(raw) > _MOST_NAMES:
        raise KeyRefused("too-many-names", f"has {len(raw)} names, at most {_MOST_NAMES} are allowed")
    values = {}
    for name, value in raw.items():
        try:
            values[_path(key, name)] = _path(key, value)
        except KeyRefused as refusal:
            message = f"`{safe_text(str(name))}` {refusal.message}"
            raise KeyRefused(refusal.code, message, refusal.help) from None
    return MappingProxyType(values)


_READERS: dict[str, Callable[[Key, Any], Any]] = {
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "text": _text,
    "choice": _choice,
    "paths": _paths,
    "targets": _targets,
    "ranks": _ranks,
    "names": _names,
}
