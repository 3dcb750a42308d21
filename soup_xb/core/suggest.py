"""Close names for a name that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def close_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names nearest to `name`, best first.

    >>> close_names("learing_rate", ["lr", "learning_rate", "epochs"])
    ['learning_rate']
    """
    return get_close_matches(name, list(known), n=count, cutoff=0.6)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question to put under an error, empty where nothing is close.

    >>> did_you_mean("pizza", ["random", "pissa", "olora"])
    'did you mean `pissa`?'
    """
    close = close_names(name, known)
    return f"did you mean {' or '.join(f'`{candidate}`' for candidate in close)}?" if close else ""
