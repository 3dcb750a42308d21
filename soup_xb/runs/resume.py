"""Going on from a checkpoint: which one, whether it belongs to this run, and what the command line decides about it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from soup_xb.core.config.load import config_dict
from soup_xb.core.config.schema import KEYS, Config
from soup_xb.core.errors import CheckpointError, ConfigError, Problem
from soup_xb.core.run.checkpoint import Checkpoint, CheckpointFacts, newest_whole, read_checkpoint
from soup_xb.core.run.manifest import fingerprint
from soup_xb.core.text import did_you_mean
from soup_xb.runs.rewards import reward_marks

SETTINGS_FILE = "settings.json"
_PRECISION = "training.precision"
# A run may go on with these changed: the first group changes nothing that is trained, the second the run's length.
_FREE = {
    "output",
    "backend",
    "training.logging_steps",
    "training.save_total_limit",
    "training.process_timeout",
}
_TOLD = {"training.epochs", "training.max_steps", "training.eval_steps", "training.save_steps"}
# Differences that are no key of the config: how many processes trained.
_PROCESSES = "processes"
_ALLOWED = {
    _PROCESSES: ", and resharded: the state is whole in the checkpoint, and from here on sums round in another order"
}


@frozen
class ResumeRequest:
    """What the command line asks for.

    `newest` takes the newest whole checkpoint of the output folder, `named` one by its path. `overrides` are
    keys, or sections of keys, that may differ from the checkpoint's. `weights_only` takes the factors alone.
    """

    newest: bool = False
    named: Path | None = None
    overrides: tuple[str, ...] = ()
    weights_only: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether the run continues the one that wrote the checkpoint."""
        return (self.newest or self.named is not None) and not self.weights_only


@frozen
class ResumePoint:
    """Where a run goes on: after `step` (0: from the start), from `folder`, with what the user should know."""

    step: int
    folder: Path | None
    notices: tuple[Problem, ...]


def check_request(request: ResumeRequest, output: Path, overwrite: bool) -> None:
    """Raise ConfigError for options that do not belong together, and for overrides that name no key."""
    if request.weights_only and request.named is None:
        raise ConfigError(
            "weights-from-where",
            "--resume-weights-only needs a checkpoint to take the weights from",
            help="name it with `--resume-from PATH`.",
        )
    if request.overrides and not request.goes_on:
        raise ConfigError(
            "nothing-to-override",
            "--override-resume says what may differ from the checkpoint that the run goes on from",
            help="add `--resume` or `--resume-from PATH`.",
        )
    if overwrite and request.named is not None and output.resolve() in request.named.resolve().parents:
        raise ConfigError(
            "contradiction",
            f"--overwrite would delete the checkpoint `{request.named}` before it is read",
            help="write to another folder with `--output`.",
        )
    names = {_PROCESSES, *KEYS}
    for name in request.overrides:
        if name not in names:
            raise ConfigError(
                "unknown-key",
                f"--override-resume: `{name}` is no key",
                help=did_you_mean(name, names)
                or "name a key such as `training.lr`, or `data` for all of it.",
            )


def find_resume_point(
    checkpoints: Path, request: ResumeRequest, facts: CheckpointFacts, settings: Mapping[str, Any]
) -> ResumePoint:
    """The checkpoint to go on from: the one named, or the newest whole one.

    Raises CheckpointError when the named one is damaged, and when the run differs from the checkpoint's in
    something that decides the numbers and that no override names. Without any checkpoint the run starts fresh,
    and a notice says so.
    """
    if request.weights_only and request.named is not None:
        return _warm_start(read_checkpoint(request.named))
    checkpoint, skipped = (read_checkpoint(request.named), ()) if request.named else newest_whole(checkpoints)
    if checkpoint is None:
        fresh = Problem(
            "fresh-start", "no whole checkpoint to resume from; starting from step 1", str(checkpoints)
        )
        return ResumePoint(0, None, (*skipped, fresh))
    told = _compare(checkpoint, facts, settings, request.overrides)
    going_on = Problem("resume", f"going on after step {checkpoint.step}", str(checkpoint.path))
    return ResumePoint(checkpoint.step, checkpoint.path, (*skipped, going_on, *told))


def run_settings(config: Config, precision: str) -> dict[str, Any]:
    """The resolved config as dotted keys, for comparison; `precision` is what `auto` came to on this device."""
    settings = dict(sorted([*_flat("", config_dict(config)), *reward_marks(config)]))
    return {**settings, _PRECISION: precision}


def settings_fingerprint(settings: Mapping[str, Any]) -> str:
    """Fingerprint of the settings that decide the numbers of a run."""
    return fingerprint({key: value for key, value in settings.items() if key not in _FREE | _TOLD})


def _warm_start(checkpoint: Checkpoint) -> ResumePoint:
    text = f"a warm start: the factors of step {checkpoint.step}, a fresh optimizer, and step 1 again"
    return ResumePoint(0, checkpoint.path, (Problem("warm-start", text, str(checkpoint.path)),))


@frozen
class _Difference:
    """One thing in which a run differs from its checkpoint; `key` is what an override has to name."""

    key: str
    problem: Problem


def _compare(
    checkpoint: Checkpoint, facts: CheckpointFacts, settings: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[Problem, ...]:
    """What the user should know of the differences. Raises CheckpointError for those that nobody allowed."""
    theirs = _read_settings(checkpoint.path)
    changed = [key for key in sorted({*theirs, *settings}) if _value(theirs, key) != _value(settings, key)]
    where = str(checkpoint.path)
    told, deciding = [], _other_surroundings(checkpoint, facts)
    for key in (key for key in changed if key not in _FREE):
        message = f"`{key}` was {json.dumps(_value(theirs, key))} and is {json.dumps(_value(settings, key))}"
        if key in _TOLD:
            told.append(Problem("changed-setting", message))
            continue
        cure = f"set it back, start anew with --overwrite, or go on with `--override-resume {key}`."
        deciding.append(_Difference(key, Problem("changed-setting", message, where, cure)))
    if checkpoint.facts.data != facts.data and not any(_decides_data(one.key) for one in deciding):
        message = "the data or its tokens are not those of the checkpoint"
        cure = "bring the old data back, start anew with --overwrite, or go on with `--override-resume data`."
        deciding.append(_Difference("data", Problem("changed-data", message, where, cure)))
    if checkpoint.facts.base != facts.base and not any(one.key == "base" for one in deciding):
        message = f"the base at `{settings.get('base')}` is not the one that the checkpoint was trained on"
        cure = "bring the old base back, start anew with --overwrite, or go on with `--override-resume base`."
        deciding.append(_Difference("base", Problem("changed-base", message, where, cure)))
    refused = [one.problem for one in deciding if not _allowed(one.key, overrides)]
    if refused:
        raise CheckpointError.of(refused)
    allowed = (
        Problem(one.problem.code, f"{one.problem.message}; allowed by name{_ALLOWED.get(one.key, '')}")
        for one in deciding
    )
    return (*_other_versions(checkpoint.facts.versions, facts.versions), *told, *allowed)


def _value(settings: Mapping[str, Any], key: str) -> Any:
    """What a key stands for: its default if it is left out."""
    default = KEYS[key].default if key in KEYS else None
    if isinstance(default, Mapping):
        default = dict(default)
    return settings.get(key, list(default) if isinstance(default, tuple) else default)


def _other_versions(theirs: Mapping[str, str], ours: Mapping[str, str]) -> tuple[Problem, ...]:
    """A notice where packages that round the numbers are not those of the checkpoint."""
    changed = [
        f"{name} {theirs[name]} -> {ours[name]}"
        for name in ours
        if theirs.get(name, ours[name]) != ours[name]
    ]
    if not changed:
        return ()
    text = (
        f"written with other versions ({', '.join(changed)}): from here on numbers may round in another way"
    )
    return (Problem("changed-versions", text),)


def _other_surroundings(checkpoint: Checkpoint, facts: CheckpointFacts) -> list[_Difference]:
    where, found = str(checkpoint.path), []
    if checkpoint.facts.backend != facts.backend:
        message = f"written on {checkpoint.facts.backend}, this run is on {facts.backend}"
        cure = (
            f"go on with --backend {checkpoint.facts.backend}, or with `--override-resume backend`: the state "
            "fits either engine, and numbers then agree to rounding."
        )
        found.append(_Difference("backend", Problem("other-backend", message, where, cure)))
    if checkpoint.facts.processes != facts.processes:
        message = f"written by {checkpoint.facts.processes} processes, this run has {facts.processes}"
        cure = f"launch as many processes as before, or go on with `--override-resume {_PROCESSES}`."
        found.append(_Difference(_PROCESSES, Problem("other-process-count", message, where, cure)))
    return found


def _decides_data(key: str) -> bool:
    """Whether another value gives other token rows: the seed draws the held-out rows, the base tokenizes."""
    return key.startswith("data.") or key in ("base", "training.seed")


def _allowed(key: str, overrides: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in overrides)


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS_FILE
    try:
        settings = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("checkpoint-damaged", f"cannot be read: {error}", where=str(file)) from error
    if not isinstance(settings, dict):
        raise CheckpointError("checkpoint-damaged", "must be an object", where=str(file))
    return settings


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or prefix.endswith(("_pattern", ".columns")):
        return [(prefix, value)]
    return [pair for key, item in value.items() for pair in _flat(f"{prefix}.{key}" if prefix else key, item)]


@frozen
class TrainOptions:
    """What the command line decides besides the file.

    `prompts` are answered by the base and the tuned model at the end, for the report.
    """

    resume: ResumeRequest = field(factory=ResumeRequest)
    overwrite: bool = False
    prompts: tuple[str, ...] = ()
