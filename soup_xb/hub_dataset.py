"""Rows of a dataset on the hub, through the datasets library."""

from __future__ import annotations

from collections.abc import Iterator

from soup_xb.core.errors import DataError
from soup_xb.core.examples import Row, Source


def hub_rows(name: str, subset: str | None, split: str) -> Iterator[Row]:
    """The rows of one split; a source's line is the row's number.

    Raises DataError for a dataset that is neither cached nor reachable, a split or subset that it does not
    have, and one that wants to run code.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(
            "datasets-missing",
            "a dataset on the hub needs the package `datasets`, which is not installed",
            where=name,
            help="`pip install datasets`, or name a local file.",
        ) from error
    try:
        rows = datasets.load_dataset(name, name=subset, split=split)
    except ConnectionError as error:
        raise DataError(
            "dataset-not-cached",
            f"there is no such file, and no such dataset in the hub's cache, and the hub cannot be reached: "
            f"{_first_line(error)}",
            where=name,
            help=f"fetch it where there is a network: `hf download --repo-type dataset {name}`, or name a local file.",
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            "dataset-not-loaded",
            f"split `{split}`{f' of subset `{subset}`' if subset else ''} cannot be loaded: {_first_line(error)}",
            where=name,
            help="check the name, `data.split` and `data.subset`.",
        ) from error
    if len(rows) == 0:
        raise DataError("data-empty", "holds no rows", where=name)
    return ((Source(name, number), row) for number, row in enumerate(rows, start=1))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
