"""A run that is opened: the base on its backend, the data as token rows, and everything decided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from attrs import evolve, frozen

from soup_xb.backends import open_session
from soup_xb.core.base.coverage import Coverage, cover
from soup_xb.core.base.folder import BaseFolder, inspect_base
from soup_xb.core.base.modules import Resolution, resolve_adapters
from soup_xb.core.base.rope import asked_scaling
from soup_xb.core.base.towers import check_towers
from soup_xb.core.config.load import LoadedConfig
from soup_xb.core.config.schema import Config
from soup_xb.core.errors import ConfigError, ModelError, Problem
from soup_xb.core.rows.batches import collate
from soup_xb.core.rows.packing import joined_documents
from soup_xb.core.rows.row import Row, TokenSequence
from soup_xb.core.rows.table import as_rows
from soup_xb.core.run.plan import Plan, make_plan, objective_of, optimizer_settings
from soup_xb.core.run.reference import Reference, base_log_probabilities
from soup_xb.core.run.session import Session, SessionSettings
from soup_xb.core.tasks import TASKS
from soup_xb.data.dataset import check_files, check_same_rows, load_dataset
from soup_xb.data.goal import streaming_goal
from soup_xb.data.hub import resolve_base
from soup_xb.data.media import open_tokenizer_for
from soup_xb.data.rendering import renderer
from soup_xb.data.tokenize import fitted_data
from soup_xb.data.tokenizer import ChatTokenizer


@frozen(eq=False)
class OpenRun:
    """A base on a backend, with the data as token rows and everything decided."""

    loaded: LoadedConfig
    base: BaseFolder
    session: Session
    tokenizer: ChatTokenizer
    plan: Plan
    coverage: Coverage
    notices: tuple[Problem, ...]

    def reference(self) -> Reference:
        """Log-probabilities of all answers under the base, the same on every process."""
        plan = self.plan
        asked = (len(plan.rows[0].sequences), plan.config.training.batch_size, plan.pad_id)
        return Reference(
            *(base_log_probabilities(self.session, rows, *asked) for rows in (plan.rows, plan.evaluation))
        )


@contextmanager
def open_run(
    loaded: LoadedConfig, backend: tuple[str, str], weights: bool = True, day: str = ""
) -> Iterator[OpenRun]:
    """Open the base, read the data, and plan; the session is closed on every exit.

    `backend` is a name with the reason for it. With `weights=False` the base's structure alone is opened. `day` is
    what a clock in the chat template tells, empty for today.
    """
    config, (name, reason) = loaded.config, backend
    if not config.data.streaming:
        check_files(config.data)
    base = inspect_base(resolve_base(config.base), weights=weights)
    check_towers(loaded, base, name)
    opened = open_tokenizer_for(TASKS[config.task].media, base.path, config.data.chat_template)
    tokenizer = opened.on_day(day)
    data, cut = fitted_data(config, base, tokenizer)
    dataset = load_dataset(data, tokenizer, config.training.seed, TASKS[config.task], streaming_goal(config))
    # It would keep its memory through the whole run; who asks it again starts it again.
    renderer().close()
    session = open_session(name, session_settings(config, base.path, weights))
    try:
        resolution, coverage = resolve_for(loaded, session)
        resolution = evolve(resolution, warnings=(*resolution.warnings, *dataset.warnings))
        plan = make_plan(config, resolution, dataset.train, dataset.evaluation, tokenizer.pad_id)
        if config.data.streaming or tokenizer.day:
            check_same_rows(session, plan.rows)
        notices = (Problem("backend", f"{name}: {reason}"), *session.notices(), *cut, *dataset.notices)
        yield OpenRun(loaded, base, session, tokenizer, plan, coverage, notices)
    finally:
        session.close()


def check_processes(loaded: LoadedConfig, processes: int) -> None:
    """Raise ConfigError where a micro-batch does not split evenly over the processes."""
    size = loaded.config.training.batch_size
    if size % processes:
        raise ConfigError(
            "batch-not-divisible",
            f"{size} rows do not split evenly over {processes} processes",
            where=loaded.where("training.batch_size"),
            help=f"`batch_size` counts rows over all processes; use {processes * max(1, round(size / processes))}.",
        )


def session_settings(config: Config, base: Path, weights: bool = True) -> SessionSettings:
    """How to open the config's base."""
    task, training = TASKS[config.task], config.training
    return SessionSettings(
        base=base,
        precision=training.precision,
        quantization=training.quantization,
        gradient_checkpointing=training.gradient_checkpointing,
        optimizer=optimizer_settings(training),
        seed=training.seed,
        weights=weights,
        objective=objective_of(config),
        pooling=training.pooling if task.embeds else "",
        rope_scaling=asked_scaling(training),
        router_aux_loss_coef=training.router_aux_loss_coef,
        sharding=training.sharding,
        cpu_offload=training.cpu_offload,
        process_timeout=training.process_timeout,
        media=task.media,
    )


def resolve_for(loaded: LoadedConfig, session: Session) -> tuple[Resolution, Coverage]:
    """The adapted modules and what of the base they cover, with the file's lines in every message."""
    written = {key: loaded.where(key) for key in loaded.written}
    base, lora = session.describe(), loaded.config.training.lora
    media = TASKS[loaded.config.task].media
    resolution = resolve_adapters(base.modules, lora, written, media)
    coverage = cover(base, resolution.adapters, lora, written)
    return evolve(resolution, warnings=(*resolution.warnings, *coverage.warnings)), coverage


# Two short documents show whether the second sees the first; rounding is far smaller than what that does.
_PROBE = 48
_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


def check_apart(session: Session, rows: Sequence[Row], pad_id: int) -> None:
    """Raise ModelError where the base lets a document see the one before it in its sequence.

    Models with a recurrent state do. Two documents are evaluated together and one by one.
    """
    packed = as_rows(rows).first_packed
    if packed is None:
        return
    first, second = (_probe(packed, index) for index in (0, 1))
    together = session.evaluate([collate([joined_documents([first, second])], pad_id)]).total
    alone = session.evaluate([collate([row], pad_id) for row in (first, second)]).total
    if abs(together - alone) > _TOLERANCE[session.precision] * max(1.0, alone):
        raise ModelError(
            "documents-not-apart",
            f"this base ({session.describe().model_type}) lets a document see the one before it in its sequence "
            f"(loss {together:.4f} together, {alone:.4f} alone)",
            where="data.packing",
            help="such a base takes one document a row: remove `data.packing`, or use `task: sft` with text rows.",
        )


def _probe(row: TokenSequence, index: int) -> TokenSequence:
    """The beginning of one document of a packed row, every token of it a target."""
    starts = (*row.documents, row.length)
    tokens = row.tokens[starts[index] : starts[index + 1]][:_PROBE]
    return TokenSequence(tokens, np.arange(tokens.size) > 0, row.source)
