"""`run.json`: what a run is, how far it came and how it ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attrs import asdict, field, fields, frozen

from soup_xb.core.disk import json_text
from soup_xb.core.errors import CheckpointError

RECORD = "run.json"
STATUSES = ("running", "finished", "interrupted", "failed")
MAX_RECORD_BYTES = 4 * 2**20


def _check_status(status: str) -> None:
    if status not in STATUSES:
        raise ValueError(f"`status` must be one of {', '.join(STATUSES)}, got `{status}`")


@frozen(kw_only=True)
class RunRecord:
    """One run, as `run.json` tells it.

    `config` is the resolved one, `train_seconds` the whole loop, `tokens_per_second` counts real tokens,
    `started` and `ended` are ISO times, `error` is the message of a failed run, `version` is soup-xb's. `day` is the
    date (YYYY-MM-DD) that a chat template with a clock tells, that of the first start; empty without one.
    """

    status: str = field(validator=lambda _, __, status: _check_status(status))
    backend: str
    base: str
    config: dict[str, Any]
    versions: dict[str, str]
    seed: int
    total_steps: int
    started: str
    version: str
    steps: int = 0
    train_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    ended: str | None = None
    error: str | None = None
    day: str = ""


# The order that a reader wants: how it went, then with what.
ORDER = ("status", "backend", "base", "steps", "total_steps", "train_seconds", "tokens_per_second")
TYPES: dict[str, tuple[type, ...]] = {
    "config": (dict,),
    "versions": (dict,),
    "seed": (int,),
    "steps": (int,),
    "total_steps": (int,),
    "peak_memory_bytes": (int,),
    "train_seconds": (int, float),
    "tokens_per_second": (int, float),
    "ended": (str, type(None)),
    "error": (str, type(None)),
}


def record_text(record: RunRecord) -> str:
    """The record as the text of `run.json`."""
    content = asdict(record, recurse=False)
    if not record.day:
        del content["day"]
    return json_text({**{key: content[key] for key in ORDER}, **content}, indent=2) + "\n"


def read_record(path: Path) -> RunRecord:
    """Read `run.json`, given itself or its folder; CheckpointError with the reason where it is damaged."""
    path = path / RECORD if path.is_dir() else path
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_RECORD_BYTES + 1)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    if len(data) > MAX_RECORD_BYTES:
        raise _damaged(path, f"larger than {MAX_RECORD_BYTES} bytes")
    try:
        return _parse(json.loads(data))
    except json.JSONDecodeError as error:
        reason = "the file is empty" if not data.strip() else f"not valid JSON at line {error.lineno}"
        raise _damaged(path, reason) from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error


def _parse(content: Any) -> RunRecord:
    if not isinstance(content, dict):
        raise TypeError("not a JSON object")
    values: dict[str, Any] = {}
    for attribute in fields(RunRecord):
        if attribute.name == "day" and attribute.name not in content:
            # Most chat templates have no clock.
            continue
        if attribute.name not in content:
            raise ValueError(f"`{attribute.name}` is missing")
        value = content[attribute.name]
        allowed = TYPES.get(attribute.name, (str,))
        # A figure that was not finite was written as null.
        if value is None and float in allowed:
            value = float("nan")
        if not isinstance(value, allowed) or isinstance(value, bool):
            raise TypeError(f"`{attribute.name}` has the wrong type")
        values[attribute.name] = value
    return RunRecord(**values)


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        "run-record-damaged",
        reason,
        where=str(path),
        help="delete it, then `--resume` goes on from the newest checkpoint; `--overwrite` starts anew.",
    )
