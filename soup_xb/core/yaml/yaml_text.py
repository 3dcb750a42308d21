"""Plain values -> YAML text that reads back to the same values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

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
