"""What a config's text means as a place on the disk."""

from __future__ import annotations

from pathlib import Path


def local_path(text: str) -> Path:
    """The path with `~` as the home folder; where there is no such home, the text as it is.

    >>> local_path("./rows.jsonl").name
    'rows.jsonl'
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)
