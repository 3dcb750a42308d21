"""Libraries that read files which somebody else wrote: what they raise becomes one message about the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from soup_xb.core.errors import SoupError

_NO_MEMORY = ("out of memory", "allocate memory")


@contextmanager
def foreign_errors(refusal: Callable[[str], SoupError]) -> Iterator[None]:
    """Inside, whatever a library raises over a foreign file becomes `refusal(the first line of it)`.

    A lack of memory passes: it says nothing about the file. Nothing but calls into libraries belongs inside.
    """
    try:
        yield
    except (SoupError, MemoryError):
        raise
    except Exception as error:
        # A damaged file makes a parser raise anything, a bare Exception too.
        text = str(error).strip()
        if isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY):
            raise
        lines = [line.strip() for line in text.splitlines()] or [type(error).__name__]
        # Some say what is wrong only under a heading.
        raise refusal(" ".join(lines[:2]) if lines[0].endswith(":") else lines[0]) from error
