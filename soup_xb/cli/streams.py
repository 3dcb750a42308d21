"""The three standard streams, which a shell may have closed and whose reader may go away."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import click


def open_missing() -> None:
    """Put the null device where a stream is closed (`2>&-`).

    A file of ours would get its number else, and what libraries write there would land in that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python itself sets None for a stream that is closed.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - open to the end
            setattr(sys, name, null)


def tell(text: str) -> None:
    """Write a line to stderr; where nobody can read it, the exit code alone tells."""
    with suppress(OSError):
        click.echo(text, err=True)


def settle() -> None:
    """Flush stdout and stderr; what cannot be delivered is dropped, or Python would exit with a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _drop(stream)


def _drop(stream: TextIO) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
