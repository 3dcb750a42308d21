"""What a checkpoint says about itself: each file with size and sha256, the step, and what the run was."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

from soup_xb.core.disk import files_below, json_text
from soup_xb.core.errors import CheckpointError

MANIFEST = "manifest.json"
VERSION = 1
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_FILES = 4096
CHUNK = 4 * 2**20
SHA256 = re.compile(r"[0-9a-f]{64}")


@frozen
class CheckpointFacts:
    """What a checkpoint belongs to; a resume compares these with the run that asks.

    `processes` is how many trained together, `config` and `data` are fingerprints, `versions` maps packages
    to versions. `base` is a fingerprint too. `bytes_expected` lets a full disk be seen before the first byte; 0 asks
    for nothing.
    """

    backend: str
    processes: int
    config: str
    data: str
    versions: dict[str, str]
    base: str = ""
    bytes_expected: int = 0


@frozen
class StoredFile:
    """One file of a checkpoint; `name` is relative, with `/` between folders."""

    name: str
    bytes: int
    sha256: str


@frozen
class Manifest:
    """The parsed `manifest.json`."""

    step: int
    facts: CheckpointFacts
    files: tuple[StoredFile, ...]


def fingerprint(value: Any) -> str:
    """The sha256 of a plain value's canonical JSON: equal values give equal text, whatever their key order.

    Raises TypeError for what JSON cannot hold, ValueError for NaN and infinities.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def describe(folder: Path, step: int, facts: CheckpointFacts) -> Manifest:
    """Read every file below `folder` once and list it with size and sha256."""
    files = tuple(
        StoredFile(path.relative_to(folder).as_posix(), path.lstat().st_size, file_sha256(path))
        for path in files_below(folder)
    )
    return Manifest(step, facts, files)


def manifest_text(manifest: Manifest) -> str:
    """`manifest.json`: the content, and the sha256 of the content, so that a flipped byte in it shows."""
    facts = asdict(manifest.facts)
    del facts["bytes_expected"]
    content = {
        "version": VERSION,
        "step": manifest.step,
        **facts,
        "files": [asdict(file) for file in manifest.files],
    }
    return json_text({**content, "sha256": fingerprint(content)}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Parse and check the manifest of a checkpoint folder; CheckpointError where it cannot be trusted."""
    content = _read_json(folder / MANIFEST)
    claimed = content.pop("sha256", None)
    if claimed != fingerprint(content):
        raise damaged(folder, f"{MANIFEST} does not match its own sha256")
    if content.get("version") != VERSION:
        raise damaged(
            folder, f"{MANIFEST} has format version {content.get('version')!r}; this soupx reads {VERSION}"
        )
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder, f"{MANIFEST}: {error}") from error


def verify(folder: Path, manifest: Manifest) -> None:
    """Check each file's size and sha256 on the disk; CheckpointError names the first that differs."""
    for file in manifest.files:
        path = folder / file.name
        _refuse_links(folder, file.name)
        try:
            found = path.lstat()
        except OSError as error:
            raise damaged(folder, f"`{file.name}` is missing") from error
        if not stat.S_ISREG(found.st_mode):
            raise damaged(folder, f"`{file.name}` is not a regular file")
        if found.st_size != file.bytes:
            raise damaged(folder, f"`{file.name}` has {found.st_size} bytes, {file.bytes} were written")
        try:
            digest = file_sha256(path)
        except OSError as error:
            raise damaged(folder, f"`{file.name}` cannot be read: {error.strerror}") from error
        if digest != file.sha256:
            raise damaged(folder, f"`{file.name}` has changed since it was written (sha256 differs)")


def damaged(folder: Path, reason: str) -> CheckpointError:
    """The error for a checkpoint that is not what was written."""
    return CheckpointError(
        "checkpoint-damaged",
        reason,
        where=str(folder),
        help="resume from another checkpoint with `--resume-from PATH`, or delete this one.",
    )


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, read in pieces; a symbolic link is not followed."""
    digest = hashlib.sha256()
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(handle, "rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    folder = path.parent
    if path.is_symlink() or not path.is_file():
        raise damaged(folder, f"{MANIFEST} is missing")
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise damaged(folder, f"{MANIFEST} cannot be read: {error.strerror}") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise damaged(folder, f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        content = json.loads(data)
        fingerprint(content)
    except (ValueError, RecursionError) as error:
        raise damaged(folder, f"{MANIFEST} is not valid JSON") from error
    if not isinstance(content, dict):
        raise damaged(folder, f"{MANIFEST} is not a JSON object")
    return content


def _parse(content: dict[str, Any]) -> Manifest:
    files = content["files"]
    if not isinstance(files, list) or not 0 < len(files) <= MAX_FILES:
        raise ValueError(f"`files` must be a list of at least one and at most {MAX_FILES}")
    versions = content["versions"]
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise TypeError("`versions` must map names to text")
    facts = CheckpointFacts(
        backend=_text(content, "backend"),
        processes=_count(content, "processes"),
        config=_text(content, "config"),
        data=_text(content, "data"),
        versions=dict(versions),
        base=_text(content, "base"),
    )
    stored = tuple(_stored_file(entry) for entry in files)
    if len({file.name for file in stored}) != len(stored):
        raise ValueError("a file is listed twice")
    return Manifest(_count(content, "step"), facts, stored)


def _stored_file(entry: Any) -> StoredFile:
    if not isinstance(entry, dict):
        raise TypeError("an entry of `files` must be an object")
    name, digest = _text(entry, "name"), _text(entry, "sha256")
    if not is_contained(name):
        raise ValueError(f"the file name {name!r} leaves the folder")
    if not SHA256.fullmatch(digest):
        raise ValueError(f"`{name}` has no sha256")
    return StoredFile(name, _count(entry, "bytes"), digest)


def is_contained(name: str) -> bool:
    """Whether a foreign relative name stays in its folder.

    >>> is_contained("rank-0/optimizer.safetensors"), is_contained("../adapter"), is_contained("/etc/passwd")
    (True, False, False)
    """
    plain = len(name) <= 1024 and "\\" not in name and name.isprintable()
    return plain and all(part not in ("", ".", "..") for part in name.split("/"))


def _refuse_links(folder: Path, name: str) -> None:
    path = folder
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise damaged(folder, f"`{name}` is reached through a symbolic link")


def _text(content: dict[str, Any], key: str) -> str:
    value = content[key]
    if not isinstance(value, str):
        raise TypeError(f"`{key}` must be text")
    return value


def _count(content: dict[str, Any], key: str) -> int:
    value = content[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"`{key}` must be a number from 0 up")
    return value
