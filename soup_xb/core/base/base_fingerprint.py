"""Which base this is, by its content: another model under the same name must not go unseen."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from soup_xb.core.base.weight_files import weight_files

# Of each tensor, from its middle: every training moves every tensor, and a whole base takes minutes to read.
_PIECE = 4096


def base_fingerprint(path: Path) -> str:
    """The sha256 of a base's config, of its weight files' headers, and of a piece of each tensor.

    A base that `inspect_base` has checked. Raises OSError where a file is gone since.
    """
    digest = hashlib.sha256(hashlib.sha256((path / "config.json").read_bytes()).digest())
    for file in weight_files(path):
        _add_file(digest, file)
    return digest.hexdigest()


def _add_file(digest: hashlib._Hash, file: Path) -> None:
    with file.open("rb") as stream:
        length = stream.read(8)
        header = stream.read(int.from_bytes(length, "little"))
        digest.update(length + header)
        data = stream.tell()
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for begin, end in sorted(tuple(entry["data_offsets"]) for entry in entries.values()):
            stream.seek(data + begin + max(0, (end - begin - _PIECE) // 2))
            digest.update(stream.read(min(_PIECE, end - begin)))
