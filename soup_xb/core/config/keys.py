"""How one config key is declared: kind, default, range, choices and meaning, kept in attrs field metadata."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from attrs import NOTHING, Attribute, field, frozen

Kind = Literal["integer", "number", "boolean", "text", "choice", "paths", "targets", "ranks", "section"]

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
