"""Finding the file that a row names, in the folder of its data file and never outside of it."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import Attachment, MediaFile, Source
from soup_xb.core.text import bytes_text, did_you_mean

# A picture or half a minute of sound is a hundredth of it.
LARGEST_FILE = 256 * 2**20
_MOST_NEIGHBOURS = 1000


def find_files(attachments: Sequence[Attachment], source: Source) -> tuple[MediaFile, ...]:
    """The files that a row names, each with its bytes' sha256.

    Raises DataError naming row and file for a name that leaves the data file's folder, links followed, and for what is
    missing, no ordinary file, too large or not readable.
    """
    root = Path(source.file).parent
    if not Path(source.file).is_file():
        raise DataError(
            "media-of-hub-rows",
            "names files, and the rows come from no file of this machine that they could lie beside",
            where=str(source),
            help="save the dataset as a .jsonl file with its pictures or sounds beside it, and name that file.",
        )
    return tuple(_found(attachment, root, str(source)) for attachment in attachments)


def read_file(file: MediaFile, where: str) -> bytes:
    """The bytes of a file that was found. Raises DataError where it is not the file of then any more."""
    try:
        content = file.path.read_bytes()
    except OSError as error:
        raise unusable(file, where, f"cannot be read any more: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise unusable(file, where, "is not the file that it was when the run began")
    return content


def unusable(file: MediaFile | Attachment, where: str, message: str, help: str = "") -> DataError:
    """The error of a picture or sound, naming it and the row."""
    return DataError("broken-file", f"`{file.name[:200]}` {message}", where=where, help=help)


def _found(attachment: Attachment, root: Path, where: str) -> MediaFile:
    path = _inside(attachment, root, where)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise unusable(attachment, where, "is not an ordinary file")
        if found.st_size > LARGEST_FILE:
            raise unusable(attachment, where, f"is larger than {bytes_text(LARGEST_FILE)}")
        content = path.read_bytes()
    except OSError as error:
        raise unusable(attachment, where, f"cannot be read: {error.strerror}") from error
    return MediaFile(attachment.kind, attachment.name, path, hashlib.sha256(content).hexdigest())


def _inside(attachment: Attachment, root: Path, where: str) -> Path:
    name = attachment.name
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise _outside(attachment, where, "is not a path inside the data file's folder")
    try:
        base = root.resolve(strict=True)
        path = base.joinpath(*pure.parts).resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        help = did_you_mean(pure.name, _neighbours(root / pure.parent))
        folder = str(root) if str(root) != "." else "the data file's folder"
        raise DataError(
            "missing-file",
            f"`{name[:200]}` is not there",
            where=where,
            help=help or f"paths are relative to {folder}.",
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise _outside(attachment, where, "leads nowhere") from error
    if base not in path.parents:
        raise _outside(attachment, where, "is a link that leads out of the data file's folder")
    return path


def _outside(attachment: Attachment, where: str, message: str) -> DataError:
    help = "put it beside the data file, or in a folder there, and write the path from there."
    return DataError("media-outside", f"`{attachment.name[:200]}` {message}", where=where, help=help)


def _neighbours(folder: Path) -> list[str]:
    try:
        return [entry.name for entry, _ in zip(folder.iterdir(), range(_MOST_NEIGHBOURS), strict=False)]
    except OSError:
        return []
