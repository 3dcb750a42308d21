"""The commit that a dataset on the hub is at: asked for, and remembered for a start without a network."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from soup_xb.core.disk import user_cache, write_bytes
from soup_xb.core.errors import DataError, Problem
from soup_xb.data.hub_dataset import first_line, network_errors

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PATIENCE = 30.0
# Letters of a commit that a message shows.
SHOWN = 12


def hub_revision(name: str) -> tuple[str, tuple[Problem, ...]]:
    """The commit that the dataset's main branch is at, and what a user should know of how it was found.

    Where the hub cannot be reached it is the one that it was at when it could be: rows of it may be kept. Raises
    DataError for a dataset that the hub does not have or show, and where no commit is known.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    unreachable: tuple[type[Exception], ...] = (OSError, *network_errors())
    remembered = user_cache("revisions") / name.replace("/", "--")
    try:
        found = HfApi().dataset_info(name, timeout=_PATIENCE).sha
    except RepositoryNotFoundError as error:
        raise DataError(
            "dataset-not-on-hub",
            f"no such file, and the hub has no such dataset or does not show it: {first_line(error)}",
            where=name,
            help="check the name; for a gated dataset log in with `hf auth login`.",
        ) from error
    except unreachable as error:
        return _from_memory(remembered, name, first_line(error))
    if found is None or not _COMMIT.fullmatch(found):
        raise DataError("dataset-not-on-hub", "the hub tells no commit of it", where=name)
    _remember(remembered, found)
    return found, ()


def _from_memory(file: Path, name: str, reason: str) -> tuple[str, tuple[Problem, ...]]:
    try:
        found = file.read_text("ascii").strip()
    except (OSError, ValueError):
        found = ""
    if not _COMMIT.fullmatch(found):
        raise DataError(
            "hub-unreachable",
            f"there is no such file, and the hub cannot be reached: {reason}",
            where=name,
            help="rows are streamed where there is a network; a start there keeps them for later ones without.",
        )
    text = f"the hub cannot be reached ({reason}); the commit that it told last is taken, {found[:SHOWN]}"
    return found, (Problem("hub-silent", text, where=name),)


def _remember(file: Path, commit: str) -> None:
    """Write the commit down, where that can be done: a later start may miss it, this one does not."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, commit.encode())
