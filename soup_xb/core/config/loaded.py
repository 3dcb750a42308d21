"""A config together with the places it was read from, so that every later error can name its line."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from soup_xb.core.config.schema import Config
from soup_xb.core.errors import Problem

COMMAND_LINE = "command line"


def place(source: str, written: Mapping[str, int], key: str) -> str:
    """Where `key` stands: `soup.yaml:7: training.lr`, without a line for a key that is not written.

    >>> place("soup.yaml", {"training.lr": 7, "base": 0}, "training.lr")
    'soup.yaml:7: training.lr'
    >>> place("soup.yaml", {"training.lr": 7, "base": 0}, "base")
    'command line: base'
    """
    line = written.get(key)
    if line is None:
        return f"{source}: {key}"
    return f"{source}:{line}: {key}" if line else f"{COMMAND_LINE}: {key}"


@frozen
class LoadedConfig:
    """A checked config and its origin.

    `written` maps each dotted key that has a value in the file to its line (from 1), entries of the pattern
    maps included (`training.lora.rank_pattern.q_proj`); the line is 0 where the command line set the key.
    """

    config: Config
    source: str
    written: Mapping[str, int]
    warnings: tuple[Problem, ...] = ()

    def where(self, key: str) -> str:
        """The place of a dotted key, for the `where` of a Problem."""
        return place(self.source, self.written, key)
