"""Everything that the rows of a source depend on: what they are kept under."""

from __future__ import annotations

import hashlib
import importlib.metadata
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import soup_xb
from soup_xb.core.run.manifest import file_sha256
from soup_xb.data.source import DataSource, Reading
from soup_xb.data.tokenize_process import Tokenizing

_LIBRARIES = ("tokenizers", "transformers", "jinja2", "numpy")
# The package's own folder, and the folders below it with everything in them, whose modules make rows.
_WHOLE_FOLDERS = ("core", "data")


def token_key(source: DataSource, reading: Reading, how: Tokenizing) -> dict[str, Any]:
    """The key of a source's rows, as JSON holds it."""
    template = how.tokenizer.template
    return {
        "name": [source.name, source.place],
        "files": [file_sha256(file.resolve()) for file in source.files],
        "readers": [file.suffix.lower() for file in source.files],
        "extra": [list(source.extra), list(reading.extra)],
        "goal": source.goal.words if source.goal is not None else "",
        "format": reading.format,
        "formats": list(reading.formats),
        "max_length": how.max_length,
        "tokenizer": how.tokenizer.fingerprint,
        "day": date.today().isoformat() if template is not None and template.is_dated else "",
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "code": _code(),
    }


def row_modules() -> list[Path]:
    """The files of the modules that make rows, and of some more: a new one is never left out."""
    package = Path(soup_xb.__file__).parent
    below = (file for folder in _WHOLE_FOLDERS for file in (package / folder).rglob("*.py"))
    return sorted([*package.glob("*.py"), *below])


@lru_cache(maxsize=1)
def _code() -> str:
    """A hash of those modules: none of them can change and leave old rows in use."""
    package, digest = Path(soup_xb.__file__).parent, hashlib.sha256()
    for file in row_modules():
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
