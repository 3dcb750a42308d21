"""What files a saved adapter's rows had: of a base that sees and hears, its processor does not tell."""

from __future__ import annotations

import json
from pathlib import Path

from soup_xb.core.base.weight_files import read_object
from soup_xb.core.config.schema import MEDIA_TASKS
from soup_xb.core.disk import write_text
from soup_xb.core.errors import ModelError

OWN = "media.json"


def write_media_kind(folder: Path, kind: str) -> None:
    """Note beside an adapter that its rows had files of this kind, image or audio."""
    write_text(folder / OWN, json.dumps({"kind": kind}) + "\n")


def read_media_task(folder: Path) -> str:
    """The task that the note stands for, empty where there is none. Raises ModelError for what was never written."""
    file = folder / OWN
    if not file.is_file():
        return ""
    kind = read_object(file, "damaged-adapter").get("kind")
    task = next((task for task, own in MEDIA_TASKS.items() if own == kind), "")
    if not task:
        raise ModelError(
            "damaged-adapter",
            f"`kind` must be one of {', '.join(MEDIA_TASKS.values())}",
            where=str(file),
            help="write the adapter again.",
        )
    return task
