"""Going on from a checkpoint: which one, and whether it belongs to this run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from soup_xb.core.checkpoint import Checkpoint, CheckpointFacts, newest_whole, read_checkpoint
from soup_xb.core.checkpoint_manifest import fingerprint
from soup_xb.core.config import Config
from soup_xb.core.config_file import config_dict
from soup_xb.core.errors import CheckpointError, Problem
from soup_xb.core.examples import TokenRow

SETTINGS_FILE = "settings.json"
# A run may go on with these changed: the first group changes nothing that is trained, the second the run's length.
_FREE = {"output", "backend", "training.logging_steps", "training.save_total_limit"}
_TOLD = {"training.epochs", "training.max_steps", "training.eval_steps", "training.save_steps"}


@frozen
class ResumePoint:
    """Where a run goes on: after `step` (0: from the start), from `folder`, with what the user should know."""

    step: int
    folder: Path | None
    notices: tuple[Problem, ...]


def find_resume_point(
    checkpoints: Path, named: Path | None, facts: CheckpointFacts, settings: Mapping[str, Any]
) -> ResumePoint:
    """The checkpoint to go on from: the one named, or the newest whole one.

    Raises CheckpointError when the named one is damaged, and when the run differs from the checkpoint's in
    something that decides the numbers. Without any checkpoint the run starts fresh, and a notice says so.
    """
    checkpoint, skipped = (read_checkpoint(named), ()) if named else newest_whole(checkpoints)
    if checkpoint is None:
        fresh = Problem(
            "fresh-start", "no whole checkpoint to resume from; starting from step 1", str(checkpoints)
        )
        return ResumePoint(0, None, (*skipped, fresh))
    told = _compare(checkpoint, facts, settings)
    going_on = Problem("resume", f"going on after step {checkpoint.step}", str(checkpoint.path))
    return ResumePoint(checkpoint.step, checkpoint.path, (*skipped, going_on, *told))


def run_settings(config: Config) -> dict[str, Any]:
    """The resolved config as dotted keys, for comparison."""
    return dict(sorted(_flat("", config_dict(config))))


def settings_fingerprint(settings: Mapping[str, Any]) -> str:
    """Fingerprint of the settings that decide the numbers of a run."""
    return fingerprint({key: value for key, value in settings.items() if key not in _FREE | _TOLD})


def data_fingerprint(rows: Sequence[TokenRow]) -> str:
    """sha256 of every token and every trained mark, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.length.to_bytes(8, "little"))
        digest.update(row.tokens.tobytes())
        digest.update(np.packbits(row.trained).tobytes())
    return digest.hexdigest()


def _compare(
    checkpoint: Checkpoint, facts: CheckpointFacts, settings: Mapping[str, Any]
) -> tuple[Problem, ...]:
    where, theirs = str(checkpoint.path), _read_settings(checkpoint.path)
    problems = []
    if checkpoint.facts.backend != facts.backend:
        message = f"written on {checkpoint.facts.backend}, this run is on {facts.backend}"
        cure = f"go on with --backend {checkpoint.facts.backend}, or start from the adapter with `adapter:`."
        problems.append(Problem("other-backend", message, where, cure))
    if checkpoint.facts.processes != facts.processes:
        message = f"written by {checkpoint.facts.processes} processes, this run has {facts.processes}"
        problems.append(Problem("other-process-count", message, where, "launch as many processes as before."))
    changed = [key for key in sorted({*theirs, *settings}) if theirs.get(key) != settings.get(key)]
    for key in (key for key in changed if key not in _FREE | _TOLD):
        message = f"`{key}` was {json.dumps(theirs.get(key))} and is {json.dumps(settings.get(key))}"
        problems.append(
            Problem("changed-setting", message, where, "set it back, or start anew with --overwrite.")
        )
    if not problems and checkpoint.facts.data != facts.data:
        message = "the data or its tokens are not those of the checkpoint"
        cure = "bring the old data back, or start anew with --overwrite."
        problems.append(Problem("changed-data", message, where, cure))
    if problems:
        raise CheckpointError.of(problems)
    return tuple(
        Problem(
            "changed-setting", f"`{key}` was {json.dumps(theirs.get(key))} and is {json.dumps(settings[key])}"
        )
        for key in changed
        if key in _TOLD
    )


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS_FILE
    try:
        settings = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("damaged-checkpoint", f"cannot be read: {error}", where=str(file)) from error
    if not isinstance(settings, dict):
        raise CheckpointError("damaged-checkpoint", "must be an object", where=str(file))
    return settings


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or prefix.endswith("_pattern"):
        return [(prefix, value)]
    return [pair for key, item in value.items() for pair in _flat(f"{prefix}.{key}" if prefix else key, item)]
