"""The JSON Schema (2020-12) of the config, for editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import NOTHING

from soup_xb.core.config.keys import Key, Range, key_of
from soup_xb.core.config.schema import Config
from soup_xb.core.keys.config_values import LONGEST_PATTERN, MOST_PATTERNS

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_TEXT = {"type": "string", "minLength": 1}
_PATTERN = {"type": "string", "minLength": 1, "maxLength": LONGEST_PATTERN}
_TYPES = {"integer": "integer", "number": "number", "boolean": "boolean", "text": "string"}


def config_schema() -> dict[str, Any]:
    """The schema as plain values; every key has its meaning, default, range and choices."""
    return {"$schema": DIALECT, "title": "soup.yaml", **_section(Config)}


def _section(cls: Any) -> dict[str, Any]:
    keys = {attribute.name: key_of(attribute) for attribute in cls.__attrs_attrs__}
    schema = {
        "type": "object",
        "properties": {name: _key(key) for name, key in keys.items()},
        "additionalProperties": False,
    }
    required = [name for name, key in keys.items() if key.required]
    return {**schema, "required": required} if required else schema


def _key(key: Key) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": key.meaning}
    if key.section is not None:
        return schema | _section(key.section)
    schema |= _value(key)
    if key.default is not NOTHING:
        schema["default"] = _plain(key.default)
    return schema


def _value(key: Key) -> dict[str, Any]:
    if key.kind == "choice":
        return {"type": "string", "enum": list(key.choices)}
    if key.kind == "paths":
        several = {"type": "array", "items": _TEXT, **({"minItems": 1} if key.required else {})}
        return {"anyOf": [_TEXT, several, *([{"type": "null"}] if key.optional else [])]}
    if key.kind == "targets":
        words = {"enum": list(key.choices)}
        return {"anyOf": [words, _PATTERN, {"type": "array", "items": _PATTERN, "minItems": 1}]}
    if key.kind == "ranks":
        entries = {"type": "integer", **_bounds(key.range)}
        limits = {"maxProperties": MOST_PATTERNS, "propertyNames": _PATTERN}
        return {"type": "object", "additionalProperties": entries, **limits}
    name = _TYPES[key.kind]
    limits = {"minLength": 1} if key.kind == "text" else _bounds(key.range)
    return {"type": [name, "null"] if key.optional else name, **limits}


def _bounds(allowed: Range) -> dict[str, Any]:
    bounds: dict[str, Any] = {}
    if allowed.low is not None:
        bounds["exclusiveMinimum" if allowed.above else "minimum"] = allowed.low
    if allowed.high is not None:
        bounds["exclusiveMaximum" if allowed.below else "maximum"] = allowed.high
    return bounds


def _plain(default: Any) -> Any:
    if isinstance(default, tuple):
        return list(default)
    return dict(default) if isinstance(default, Mapping) else default
