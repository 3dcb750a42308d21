"""What a YAML syntax error means, in words for the person who wrote the line."""

from __future__ import annotations

from ruamel.yaml.error import MarkedYAMLError

from soup_xb.core.errors import Problem

_BRACKETS = {"a flow sequence": "[", "a flow mapping": "{"}


def syntax_problem(error: MarkedYAMLError, source: str) -> Problem:
    """The problem behind ruamel.yaml's error, with line and column counted from 1."""
    cause = error.problem or error.context or "this is not YAML"
    context = error.context or ""
    mark = error.problem_mark or error.context_mark
    opened = error.context_mark
    message, help = _generic(cause), "a text with special characters goes in quotes."
    if r"'\t'" in cause or "\t" in cause:
        message, help = "a tab is used for indentation", "YAML indents with spaces; replace the tab."
    elif "quoted scalar" in context and "end of" in cause:
        mark, message, help = opened, "a quote is opened and never closed", "close the quote."
    elif context.removeprefix("while parsing ") in _BRACKETS:
        bracket = _BRACKETS[context.removeprefix("while parsing ")]
        mark, message = opened, f"a `{bracket}` is opened and not closed as it should be"
        help = f"separate the entries by commas and close with `{']' if bracket == '[' else '}'}`."
    elif "mapping values are not allowed" in cause:
        message = "a `:` where no key can stand"
        help = "check the indentation of this line and the one above; quote a text that holds `: `."
    elif "could not find expected ':'" in cause:
        mark, message, help = (
            opened,
            "a key without a `:`",
            "write `key: value`, with a space after the colon.",
        )
    elif "cannot start any token" in cause:
        help = "put the value in quotes."
    elif "<document start>" in cause:
        message, help = (
            "something follows the end of the config",
            "one mapping of keys is all that a config holds.",
        )
    elif "<stream end>" in cause:
        message, help = "the text ends where a value is expected", "close every bracket and quote."
    elif cause.startswith("expected the node content"):
        message = f"{cause.rpartition(' ')[2].replace(chr(39), chr(96))} where a value is expected"
        help = "delete it, or put the value in quotes."
    elif "<block end>" in cause:
        message = "a list entry, key or bracket where it does not fit"
        help = "indent the keys of one section alike; a list entry begins with `- `."
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
    return Problem("yaml-syntax", f"line {line}, column {column}: {message}", f"{source}:{line}", help)


def _generic(cause: str) -> str:
    cause = cause.replace("found character", "the character").replace("that cannot", "cannot")
    return cause.splitlines()[0][:120]
