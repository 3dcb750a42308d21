"""Plain YAML values -> Config, through a strict cattrs converter that finds every fault at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import attrs
from attrs import frozen
from cattrs import Converter
from cattrs.errors import AttributeValidationNote, ClassValidationError, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn, override

from soup_xb.core.config.keys import key_of
from soup_xb.core.config.schema import KEYS, Config
from soup_xb.core.keys.config_values import KeyRefused, read_value, shown

# Stands in for required text that is missing or wrong, so that the rest of the file can still be checked.
_PLACEHOLDER = "?"


@frozen
class Fault:
    """What is wrong with the key `name` of a `section` (dotted, "" at the top)."""

    section: str
    name: str
    refusal: KeyRefused

    @property
    def key(self) -> str:
        """The dotted name of the key."""
        return f"{self.section}.{self.name}" if self.section else self.name


@frozen
class Reading:
    """A config and the faults on the way. Where `faults` is not empty, those keys hold their defaults."""

    config: Config
    faults: tuple[Fault, ...]


def read_config(tree: Mapping[str, Any]) -> Reading:
    """Read the whole config; every unknown, missing, mistyped or out-of-range key is a Fault."""
    tree = {"data": {}, **tree}
    try:
        return Reading(_read_section(tree, Config), ())
    except ClassValidationError as error:
        faults = tuple(_faults(error, ""))
    sound = _without(tree, {fault.key for fault in faults}, "")
    sound.setdefault("base", _PLACEHOLDER)
    sound.setdefault("data", {}).setdefault("train", _PLACEHOLDER)
    return Reading(_read_section(sound, Config), faults)


@cache
def _section_reader(cls: type) -> Any:
    """The cattrs reader of a config class, each attribute read by its declaration."""
    hooks = {attribute.name: override(struct_hook=_hook(attribute)) for attribute in attrs.fields(cls)}
    return make_dict_structure_fn(cls, Converter(), _cattrs_forbid_extra_keys=True, **hooks)  # type: ignore[arg-type]


def _hook(attribute: attrs.Attribute[Any]) -> Any:
    key = key_of(attribute)
    if key.section is not None:
        return lambda raw, _: _read_section(raw, key.section)
    return lambda raw, _: read_value(key, raw)


def _read_section(raw: Any, cls: Any) -> Any:
    # A section whose keys are all commented out is a null in YAML.
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise KeyRefused(
            "wrong-type", f"must be a mapping of keys, got {shown(raw)}", "write its keys below it, indented."
        )
    return _section_reader(cls)(raw, cls)


def _faults(error: ClassValidationError, section: str) -> Iterator[Fault]:
    for exception in error.exceptions:
        if isinstance(exception, ForbiddenExtraKeysError):
            for unknown in exception.extra_fields:
                yield Fault(section, unknown, KeyRefused("unknown-key", "no such key"))
            continue
        notes = getattr(exception, "__notes__", ())
        name = next(note.name for note in notes if isinstance(note, AttributeValidationNote))
        key = f"{section}.{name}" if section else name
        if isinstance(exception, ClassValidationError):
            yield from _faults(exception, key)
        elif isinstance(exception, KeyRefused):
            yield Fault(section, name, exception)
        elif isinstance(exception, KeyError):
            yield Fault(section, name, KeyRefused("missing-key", "is missing", _how_to_write(key)))
        else:
            raise exception


def _how_to_write(key: str) -> str:
    return f"write `{key.rpartition('.')[2]}:`. {KEYS[key].meaning}"


def _without(tree: Any, faulty: set[str], prefix: str) -> dict[str, Any]:
    kept = {}
    for name, value in (tree or {}).items():
        key = prefix + name
        if key in faulty:
            continue
        section = key in KEYS and KEYS[key].section is not None
        kept[name] = _without(value, faulty, f"{key}.") if section else value
    return kept
