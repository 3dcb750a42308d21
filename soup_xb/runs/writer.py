"""Keeping a run: its folder, its events and checkpoints while it goes, its adapter and report at the end."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from attrs import evolve

from soup_xb import __version__
from soup_xb.core.adapter.vera import shared_entries
from soup_xb.core.base.folder import base_fingerprint
from soup_xb.core.config.load import config_dict
from soup_xb.core.errors import CheckpointError, ModelError, SoupError, StoppedError
from soup_xb.core.rows.table import combined
from soup_xb.core.run.checkpoint import CheckpointFacts, remove_after, rotate, write_checkpoint
from soup_xb.core.run.events import Event, Listener, Notice, SaveEvent, losses_until
from soup_xb.core.run.folder import ADAPTER, CHECKPOINTS, RunFolder, open_run_folder
from soup_xb.core.run.loop import WINDOW, LoopResult
from soup_xb.core.run.plan import Plan
from soup_xb.core.run.record import RunRecord, read_record
from soup_xb.core.run.stop import is_first_process
from soup_xb.core.text import legible
from soup_xb.runs.open import OpenRun
from soup_xb.runs.resume import (
    SETTINGS_FILE,
    ResumePoint,
    TrainOptions,
    check_request,
    find_resume_point,
    run_settings,
    settings_fingerprint,
)

_PACKAGES = ("torch", "transformers", "peft", "mlx", "mlx-lm", "numpy", "safetensors", "tokenizers")


class RunWriter:
    """What a run writes. On every process but the first `folder` is None and nothing is written."""

    def __init__(
        self, run: OpenRun, options: TrainOptions, folder: RunFolder | None, listeners: Sequence[Listener]
    ) -> None:
        """Keep `run` in an opened folder, and tell the listeners of every event."""
        self.run, self.options, self.folder = run, options, folder
        self.listeners = listeners if folder else ()
        self.settings = run_settings(run.loaded.config, run.session.precision)
        # The checkpoint that the run goes on from, once `start` has found it.
        self.resumed_from: Path | None = None
        self.facts = CheckpointFacts(
            backend=run.session.backend,
            processes=run.session.processes,
            config=settings_fingerprint(self.settings),
            data=combined(run.plan.rows.fingerprint, run.plan.evaluation.fingerprint),
            versions=versions(),
            base=base_fingerprint(run.base.path),
            bytes_expected=checkpoint_bytes(run.plan),
        )
        self.record = RunRecord(
            status="running",
            backend=run.session.backend,
            base=run.loaded.config.base,
            config=config_dict(run.loaded.config),
            versions=self.facts.versions,
            seed=run.loaded.config.training.seed,
            total_steps=run.plan.total_steps,
            started=now(),
            version=__version__,
            day=run.tokenizer.day,
        )

    def emit(self, event: Event) -> None:
        """Write an event to `metrics.jsonl` and tell the listeners."""
        if self.folder is not None:
            self.folder.record_event(event)
        self.tell(event)

    def is_complete(self) -> bool:
        """Whether a resume finds a run that is finished already; `record` is then the finished run's."""
        path = Path(self.run.loaded.config.output)
        if not self.options.resume.newest or not (path / ADAPTER).is_dir():
            return False
        try:
            record = read_record(path)
        except CheckpointError:
            return False
        complete = record.status == "finished" and record.steps >= self.run.plan.total_steps
        if complete:
            self.record = record
        return complete

    def start(self) -> int:
        """Read the checkpoint to go on from, and write the first `run.json`. Returns the steps already done.

        Later checkpoints than that one are removed: they belong to steps that are trained anew.
        """
        point = self._resume_point()
        self.resumed_from = point.folder
        self.run.session.agree(0)
        if self.folder is not None:
            self.folder.check_space(3 * self.facts.bytes_expected)
            self.folder.truncate_metrics(point.step)
            remove_after(self.folder.checkpoints, point.step)
            self.record = evolve(self.record, steps=point.step)
            self.folder.write_record(self.record)
            for notice in self.folder.notices:
                self.emit(notice)
        for problem in point.notices:
            self.emit(Notice(problem))
        return point.step

    def losses_until(self, step: int) -> tuple[float, ...]:
        """The losses that a restart near `step` is judged by; empty on every process but the first."""
        return () if self.folder is None else losses_until(self.folder.metrics, step, 2 * WINDOW)

    def save(self, step: int) -> None:
        """Write the checkpoint of a step; the other processes wait until it is whole."""
        if self.folder is not None:
            started = time.perf_counter()
            saved = write_checkpoint(self.folder.checkpoints, step, self._write_state, self.facts)
            rotate(self.folder.checkpoints, self.run.loaded.config.training.save_total_limit)
            seconds = time.perf_counter() - started
            self.emit(SaveEvent(step, str(saved.path), saved.bytes, seconds))
        self.run.session.agree(0)

    def ended(self, result: LoopResult, status: str) -> RunRecord:
        """Write the last `run.json`."""
        record = evolve(
            self.record,
            status=status,
            steps=result.step,
            train_seconds=result.seconds,
            tokens_per_second=result.tokens / result.seconds if result.seconds else 0.0,
            peak_memory_bytes=self.run.session.peak_memory_bytes(),
            ended=now(),
        )
        return self._replace_record(record)

    def failed(self, error: BaseException) -> None:
        """Note in `run.json` what ended the run."""
        told = isinstance(error, SoupError | KeyboardInterrupt) and str(error)
        text = told or legible(f"{type(error).__name__}: {error}")
        self._replace_record(evolve(self.record, status="failed", ended=now(), error=text))

    def tell(self, event: Event) -> None:
        """Tell the listeners alone."""
        for listener in self.listeners:
            listener(event)

    def _replace_record(self, record: RunRecord) -> RunRecord:
        self.record = record
        if self.folder is not None:
            self.folder.write_record(record)
        return record

    def _resume_point(self) -> ResumePoint:
        request = self.options.resume
        if not (request.newest or request.named):
            return ResumePoint(0, None, ())
        checkpoints = Path(self.run.loaded.config.output) / CHECKPOINTS
        point = find_resume_point(checkpoints, request, self.facts, self.settings)
        if point.folder is not None:
            with _fitting(point.folder):
                self.run.session.load_state(point.folder, optimizer=request.goes_on)
        return point

    def _write_state(self, folder: Path) -> None:
        self.run.session.save_state(folder)
        text = json.dumps(self.settings, indent=2, sort_keys=True) + "\n"
        (folder / SETTINGS_FILE).write_text(text, "utf-8")


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Inside, factors of other modules or ranks are a checkpoint's fault."""
    try:
        yield
    except ModelError as error:
        raise CheckpointError(
            "foreign-checkpoint",
            f"its factors do not fit this run: {error.problems[0].message}",
            where=str(folder),
            help="go on with the modules, ranks and kind of adapter that it was written with.",
        ) from error


def checkpoint_bytes(plan: Plan) -> int:
    """The most that a checkpoint may take: factors, a start, two moments, merges' pieces, VeRA's projections."""
    pieces = 2 + len(plan.restart_steps) if plan.adapters.merges else 0
    trained = sum(adapter.parameters for adapter in plan.adapters.modules)
    return 4 * ((4 + pieces) * trained + shared_entries(plan.adapters.modules))


@contextmanager
def output_folder(output: Path, options: TrainOptions) -> Iterator[RunFolder | None]:
    """The locked output folder on the first process, None on the others."""
    if not is_first_process():
        yield None
        return
    check_request(options.resume, output, options.overwrite)
    with open_run_folder(output, overwrite=options.overwrite, resume=options.resume.goes_on) as folder:
        yield folder


def first_day(output: Path, options: TrainOptions) -> str:
    """The date that a chat template with a clock told in the run to go on from; empty for a run that starts."""
    if not options.resume.goes_on:
        return ""
    named = options.resume.named
    folder = output if named is None else named.resolve().parent.parent
    try:
        return read_record(folder).day
    except CheckpointError:
        return ""


@contextmanager
def failure_noted(writer: RunWriter) -> Iterator[None]:
    """Inside, whatever ends the run but a polite stop is noted in `run.json`."""
    try:
        yield
    except StoppedError:
        raise
    except BaseException as error:
        writer.failed(error)
        raise


def versions() -> dict[str, str]:
    """The installed versions of the packages that numbers depend on."""
    found = {"soup-xb": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time as ISO text, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
