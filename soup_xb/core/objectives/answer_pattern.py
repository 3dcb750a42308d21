"""The pattern that finds an answer in what a model wrote, and the rewards that go by it."""

from __future__ import annotations

import re
from typing import Any

from soup_xb.core.errors import ConfigError

BUILT_IN = ("exact-match", "format")


def compiled_pattern(pattern: str, where: str) -> Any:
    """The answer's pattern, whose dot matches line breaks too. Raises ConfigError for text that is none."""
    # Its import takes a tenth of what `soupx check` does.
    import regex

    try:
        re.compile(pattern, re.DOTALL)
        return regex.compile(pattern, regex.DOTALL)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            "bad-pattern",
            f"`{pattern}` is not a regular expression: {error}",
            where=where,
            help="write one such as `<answer>(.*?)</answer>`.",
        ) from error
