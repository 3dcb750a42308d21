"""A rule over several keys of a config, and the words for two keys that exclude each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attrs import frozen

from soup_xb.core.config.loaded import LoadedConfig
from soup_xb.core.errors import Problem


@frozen
class Rule:
    """One check. It is left out where one of the `keys` that it reads was refused already."""

    check: Callable[[LoadedConfig], Iterator[Problem]]
    keys: tuple[str, ...]
    warning: bool = False


def excluded(loaded: LoadedConfig, subject: tuple[str, str], other: str, reason: str) -> Problem:
    """The problem of two keys that do not go together; `subject` is a key and what it stands for."""
    key, what = subject
    return Problem(
        "contradiction",
        f"{what} does not go with `{other}` ({line_words(loaded, other)}): {reason}",
        loaded.where(key),
        "remove one of the two.",
    )


def line_words(loaded: LoadedConfig, key: str) -> str:
    """The line of a key, in words."""
    line = loaded.written.get(key)
    if line is None:
        return "not written"
    return f"line {line}" if line else "command line"
