"""The hub: a base's name -> a local folder, and rows of a dataset, downloaded or streamed at one remembered commit."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from soup_xb.core.disk import local_path, user_cache, write_bytes
from soup_xb.core.errors import DataError, ModelError, Problem
from soup_xb.core.random_numbers import permutation
from soup_xb.core.rows.examples import Row, Source
from soup_xb.core.text import holds_token

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
# What a base needs and nothing that can run: no pickles, no code.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def resolve_base(name: str) -> Path:
    """The local folder of a base.

    A hub id is taken from the hub's cache where it is whole, and downloaded otherwise. Raises ModelError for
    a folder that is not there and for a hub id that is neither cached nor reachable.
    """
    folder = local_path(name)
    try:
        if folder.is_dir():
            return folder
        what = "is not a folder" if folder.exists() else "no such folder, and not a hub id"
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    if not _HUB_ID.fullmatch(name) or not what.startswith("no such"):
        raise ModelError(
            "base-not-found",
            f"`{name}`: {what}",
            where="base",
            help="name a model folder, or a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`.",
        )
    return _from_hub(name)


def portable_name(name: str) -> str:
    """What an adapter's settings name its base: the hub id, or the absolute path of a local folder.

    A path with an access token in it stays as it was given: nothing that is written may hold one.
    """
    path = str(local_path(name).absolute()) if _is_folder(name) else name
    return name if holds_token(path) else path


def base_at_hand(name: str) -> Path | None:
    """The local folder of a base, None where it would have to be downloaded first."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if _is_folder(name):
        return local_path(name)
    if not _HUB_ID.fullmatch(name):
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=True))
    except (HfHubHTTPError, HFValidationError, OSError):
        return None


def _is_folder(name: str) -> bool:
    with suppress(OSError):
        return bool(name) and local_path(name).is_dir()
    return False


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            "base-not-on-hub",
            f"the hub refused `{name}`: {str(error).splitlines()[0]}",
            where="base",
            help="check the name; for a gated base log in with `hf auth login`.",
        ) from error
    except OSError as error:
        raise ModelError(
            "base-not-cached",
            f"`{name}` is not in the hub's cache, and the hub cannot be reached",
            where="base",
            help=f"fetch it where there is a network: `hf download {name}`, or name a local folder.",
        ) from error


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
