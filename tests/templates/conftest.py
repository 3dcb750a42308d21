"""A folder of templates to tamper with, and a witness of every file that is opened."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

CONFIG = "base: tiny\ndata:\n  train: ./data/chat.jsonl\n"
_WATCHES: list[list[str]] = []


def _witness(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _WATCHES and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _WATCHES[-1].append(os.fsdecode(arguments[0]))


# It sees Python's open, os.open and everything built on them, and it cannot be taken away again.
sys.addaudithook(_witness)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The name of every file that is opened inside the block."""
    _WATCHES.append([])
    try:
        yield _WATCHES[-1]
    finally:
        _WATCHES.pop()


@pytest.fixture
def opened() -> Callable[[], AbstractContextManager[list[str]]]:
    """A block in which the name of every file that is opened is written down."""
    return opened_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A right folder of templates, and beside it `outside`, which must never be read."""
    place = tmp_path / "templates"
    (place / "data").mkdir(parents=True)
    (place / "chat.yaml").write_text(CONFIG)
    (place / "data" / "chat.jsonl").write_text('{"text": "a row"}\n')
    sha256 = hashlib.sha256(CONFIG.encode()).hexdigest()
    chat = {
        "file": "chat.yaml",
        "description": "Chat.",
        "task": "sft",
        "backends": ["torch"],
        "sha256": sha256,
    }
    manifest = json.dumps({"version": 1, "templates": {"chat": chat}})
    (place / "manifest.json").write_text(manifest)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "canary.yaml").write_text(CONFIG)
    (outside / "manifest.json").write_text(manifest)
    (outside / "chat.jsonl").write_text('{"text": "a secret"}\n')
    return place
