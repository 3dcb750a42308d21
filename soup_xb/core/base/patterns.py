"""Module-name patterns: one rule for `target_modules`, `rank_pattern` and `alpha_pattern`."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable
from typing import Any

import regex

from soup_xb.core.errors import ConfigError

# Generous for tens of thousands of module names; a nested quantifier that backtracks without end hits it.
SECONDS_PER_PATTERN = 2.0


def matching_names(pattern: str, names: Iterable[str], where: str = "") -> list[str]:
    r"""The names that `pattern` reaches, in their order.

    A pattern KEY reaches a name when `(.*\.)?(KEY)` matches it whole, which is PEFT's rule for `rank_pattern`:
    `q_proj` reaches `model.layers.0.self_attn.q_proj`, and `proj` reaches no `q_proj`.

    Raises ConfigError for text that is no regular expression, and for one that runs away.

    >>> matching_names("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"])
    ['model.layers.0.self_attn.q_proj']
    """
    compiled = _compiled(pattern, where)
    deadline = time.monotonic() + SECONDS_PER_PATTERN
    try:
        return [
            name
            for name in names
            if compiled.fullmatch(name, timeout=max(1e-3, deadline - time.monotonic()), concurrent=False)
        ]
    except (TimeoutError, MemoryError) as error:
        raise ConfigError(
            "runaway-pattern",
            f"`{pattern}` takes more than {SECONDS_PER_PATTERN:g} s to match the module names",
            where=where,
            help="write it without a repetition inside a repetition, such as `(a+)+`.",
        ) from error


def _compiled(pattern: str, where: str) -> Any:
    """The rule in the words of `regex`, which alone can be stopped; what `re`, and so PEFT, refuses is refused."""
    try:
        with warnings.catch_warnings():
            # `re` warns of what a later version may read otherwise.
            warnings.simplefilter("ignore")
            re.compile(pattern)  # by itself, so that `a)|(b` is refused
        return regex.compile(rf"(.*\.)?({pattern})")
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            "bad-pattern",
            f"`{pattern}` is not a regular expression: {error}",
            where=where,
            help="write a module name such as `q_proj`, or a regular expression such as `layers\\.[0-7]\\..*`.",
        ) from error
