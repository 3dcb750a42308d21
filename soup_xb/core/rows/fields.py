"""Texts under the keys of a row, and what is said about a value of another type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soup_xb.core.errors import DataError
from soup_xb.core.rows.files import kind


def read_text(row: Mapping[str, Any], key: str, where: str) -> str:
    """A text under a key. Raises DataError where it is missing, null, or no text."""
    if key not in row:
        found = ", ".join(f"`{name}`" for name in row) or "nothing"
        raise DataError("missing-field", f"is missing; found {found}", where=f"{where}{key}")
    value = row[key]
    if not isinstance(value, str):
        raise mistyped(f"{where}{key}", "text", value)
    return checked_text(value, f"{where}{key}")


def checked_text(text: str, where: str) -> str:
    """The text itself. Raises DataError where it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "broken-text",
            f"holds half of a surrogate pair at character {error.start + 1}",
            where=where,
            help="write the character whole, as UTF-8.",
        ) from error
    return text


def mistyped(where: str, wanted: str, value: Any, help: str = "") -> DataError:
    """The error of a value that is null or of another type."""
    code = "null-field" if value is None else "mistyped-field"
    return DataError(code, f"must be {wanted}, got {kind(value)}", where=where, help=help)
