"""Rows of a dataset on the hub, through the datasets library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import Row, Source

# The datasets library names a reader by its module. `cache` is what one of the others has read before.
_READERS = "datasets.packaged_modules."
_KINDS = ("parquet", "arrow", "json", "csv", "text", "cache")


class HubRows:
    """The rows of one split, anew with each iteration; `files` are what the library keeps them in."""

    def __init__(self, name: str, rows: Any) -> None:
        self._name, self._rows = name, rows
        self.files = tuple(Path(file["filename"]) for file in rows.cache_files)

    def __iter__(self) -> Iterator[Row]:
        return ((Source(self._name, number), row) for number, row in enumerate(self._rows, start=1))


def hub_rows(name: str, subset: str | None, split: str) -> HubRows:
    """The rows of one split; a source's line is the row's number.

    Raises DataError for a dataset that is neither cached nor reachable, a split or subset that it does not
    have, and one whose files are no tables of text.
    """
    datasets = datasets_library(name)
    try:
        builder = datasets.load_dataset_builder(name, name=subset)
        check_kind(builder, name)
        builder.download_and_prepare()
        rows = builder.as_dataset(split=split)
    except ConnectionError as error:
        raise DataError(
            "dataset-not-cached",
            f"there is no such file, and no such dataset in the hub's cache, and the hub cannot be reached: "
            f"{first_line(error)}",
            where=name,
            help=f"fetch it where there is a network: `hf download --repo-type dataset {name}`, or name a local file.",
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            "dataset-not-loaded",
            f"split `{split}`{f' of subset `{subset}`' if subset else ''} cannot be loaded: {first_line(error)}",
            where=name,
            help="check the name, `data.split` and `data.subset`.",
        ) from error
    if len(rows) == 0:
        raise DataError("data-empty", "holds no rows", where=name)
    return HubRows(name, rows)


def datasets_library(name: str) -> Any:
    """The datasets library. Raises DataError where it is not installed, for the dataset that needs it."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(
            "datasets-missing",
            "a dataset on the hub needs the package `datasets`, which is not installed",
            where=name,
            help="`pip install datasets`, or name a local file.",
        ) from error
    return datasets


def network_errors() -> tuple[type[Exception], ...]:
    """What the hub's library raises where a request fails, whichever HTTP library is under it; not OSError."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(
        kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception) and kind is not OSError
    )


def check_kind(builder: Any, name: str) -> None:
    """Refuse what the library would read by other means than tables of text: archives may hold pickles."""
    modules = [kind.__module__ for kind in type(builder).__mro__ if kind.__module__.startswith(_READERS)]
    kind = modules[0].removeprefix(_READERS).partition(".")[0] if modules else type(builder).__module__
    if kind not in _KINDS:
        raise DataError(
            "dataset-kind",
            f"its files are of the kind `{kind}`, which is not read",
            where=name,
            help="take a dataset of Parquet, Arrow, JSON, CSV or text files, or bring its rows into a local file.",
        )


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
