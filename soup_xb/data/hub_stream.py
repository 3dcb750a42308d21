"""Rows of a dataset on the hub, read over the network as far as they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from soup_xb.core.errors import DataError, Problem
from soup_xb.core.random_numbers import permutation
from soup_xb.core.rows.examples import Row, Source
from soup_xb.data.hub_dataset import check_kind, datasets_library, first_line, network_errors
from soup_xb.data.hub_revision import SHOWN, hub_revision


class HubStream:
    """The rows of one split at one commit, its files in an order that the seed decides.

    Making one asks the hub for nothing but the commit that the dataset is at, `revision`.
    """

    def __init__(self, name: str, subset: str | None, split: str, seed: int) -> None:
        """Raises DataError for a dataset that is not there, or that nobody can tell the commit of."""
        self.name, self._subset, self._split, self._seed = name, subset, split, seed
        self.revision, self.notices = hub_revision(name)
        self._files = self._opened = self._read = 0

    def rows(self) -> Iterator[Row]:
        """The rows, from the first on with each call; a source's line is the row's number in this order.

        Raises DataError for a split or subset that the dataset does not have, for one whose files are no tables of
        text, and where the network fails or a file is damaged.
        """
        self._files = self._opened = self._read = 0
        for row in self._guarded():
            self._read += 1
            yield Source(self.name, self._read), row
        if not self._read:
            raise DataError("data-empty", "holds no rows", where=self.name)

    def told(self) -> tuple[Problem, ...]:
        """How many of the files were opened, once rows were read."""
        text = (
            f"rows of {self._opened:,} of {self._files:,} files of commit {self.revision[:SHOWN]} were read, the files "
            f"in an order of seed {self._seed}"
        )
        return (Problem("streamed", text, where=self.name),)

    def _guarded(self) -> Iterator[dict[str, Any]]:
        """The rows of the files; what the libraries raise comes in the words of this house."""
        library = datasets_library(self.name)
        silences: tuple[type[Exception], ...] = (ConnectionError, TimeoutError, *network_errors())
        try:
            dataset = self._opening(library)
            self._files = dataset.num_shards
            for file in range(self._files):
                self._opened += 1
                yield from dataset.shard(self._files, file)
        except silences as error:
            raise DataError(
                "stream-broken",
                f"the hub stopped answering after row {self._read:,}: {first_line(error)}",
                where=self.name,
                help="start again when it can be reached: nothing is trained yet, and half of the rows are not kept.",
            ) from error
        except (OSError, ValueError, RuntimeError, ImportError, library.exceptions.DatasetsError) as error:
            raise DataError(
                "stream-unreadable",
                f"cannot be read after row {self._read:,}: {first_line(error)}",
                where=self.name,
                help="check `data.subset`; a file that is damaged on the hub is for its owner to mend.",
            ) from error

    def _opening(self, datasets: Any) -> Any:
        """The library's own stream of the files in their order."""
        builder = datasets.load_dataset_builder(self.name, name=self._subset, revision=self.revision)
        check_kind(builder, self.name)
        known = builder.config.data_files
        if known is None:
            raise ConnectionError("what an earlier run downloaded is all that can be opened")
        if self._split not in known:
            raise DataError(
                "split-missing",
                f"has no split `{self._split}`; it has {', '.join(map(str, known)) or 'none'}",
                where=self.name,
                help="name one of them in `data.split`; a part of a split cannot be streamed.",
            )
        files = sorted(known[self._split])
        check_places(files, self.name, self.revision)
        order = permutation(len(files), "files", self._seed, self.name)
        ordered = datasets.data_files.DataFilesList([files[index] for index in order], origin_metadata=[])
        # Splits that are not asked for would be looked into for the types of the columns.
        builder.config.data_files = datasets.data_files.DataFilesDict({self._split: ordered})
        stream = builder.as_streaming_dataset(split=self._split)
        if stream.features is None:
            return stream
        columns = copy.deepcopy(dict(stream.features))
        # What would be decoded may name a file anywhere; no task that streams reads it.
        media = [feature for column in columns.values() for feature in _decoded(column)]
        for feature in media:
            feature.decode = False
        return stream.cast(datasets.Features(columns)) if media else stream


def _decoded(feature: Any) -> Iterator[Any]:
    """The features of pictures, sounds and the like in a column: what the library opens when a row is read."""
    inner = getattr(feature, "feature", None)
    if isinstance(feature, dict | list):
        for part in feature.values() if isinstance(feature, dict) else feature:
            yield from _decoded(part)
    elif inner is not None:
        yield from _decoded(inner)
    # JSON text is decoded too, and opens nothing.
    elif hasattr(feature, "decode") and type(feature).__name__ != "Json":
        yield feature


def check_places(files: list[str], name: str, revision: str) -> None:
    """Raise DataError where a dataset's own description leads out of it, to this disk or to others."""
    folder = f"hf://datasets/{name}@{revision}/"
    outside = [file for file in files if not file.startswith(folder)]
    if outside:
        raise DataError(
            "stream-leads-out",
            f"names a file outside of the dataset: {outside[0]}",
            where=name,
            help="bring its rows into a local file.",
        )
