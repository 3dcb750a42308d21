"""Reference log-probabilities of all answers under the base, before the first step: read back, or computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve

from soup_xb.core.errors import Problem
from soup_xb.core.objectives.objective import row_log_probabilities
from soup_xb.core.rows.batches import sequence_batches
from soup_xb.core.rows.row import Row
from soup_xb.core.run.events import Notice
from soup_xb.core.run.folder import REFERENCE
from soup_xb.core.run.plan import Plan
from soup_xb.core.run.reference import Reference, read_reference, reference_key, write_reference
from soup_xb.core.tasks import TASKS
from soup_xb.runs.open import OpenRun
from soup_xb.runs.writer import RunWriter

Array = np.ndarray[Any, Any]


def plan_with_reference(run: OpenRun, writer: RunWriter) -> Plan:
    """The plan with the base's log-probabilities, where the task measures against them; else the plan itself.

    A resumed run reads what its first start wrote, in its own folder or in that of the checkpoint, so that it goes on
    with the same bytes. The values are computed anew on every process where one of them finds no file, or one that
    is torn or belongs to other data or another base.
    """
    plan, config = run.plan, run.loaded.config
    if not TASKS[config.task].needs_reference:
        return plan
    path = Path(config.output) / REFERENCE
    facts = {
        "data": writer.facts.data,
        "base": config.base,
        "precision": run.session.precision,
        "quantization": config.training.quantization,
    }
    key = reference_key(facts, run.base.path)
    shapes = {"train": _shape(plan.rows, plan.rows), "evaluation": _shape(plan.evaluation, plan.rows)}
    places = [path] if writer.resumed_from is None else [path, writer.resumed_from.parents[1] / REFERENCE]
    kept = (read_reference(place, key, shapes) for place in places)
    found = next((reference for reference in kept if reference is not None), None)
    if run.session.agree(int(found is None)) or found is None:
        found = computed_reference(run)
        if writer.folder is not None:
            answers = sum(rows * sequences for rows, sequences in shapes.values())
            text = f"the base's log-probabilities of {answers:,} answers are in `{REFERENCE}`"
            writer.emit(Notice(Problem("reference", text)))
    if writer.folder is not None:
        write_reference(path, key, found)
    return evolve(plan, reference=found)


def computed_reference(run: OpenRun) -> Reference:
    """Log-probabilities of all answers under the base, the same on every process."""
    session, plan = run.session, run.plan
    if session.scorer is None:
        raise RuntimeError(f"the {session.backend} session computes no log-probabilities")
    parts = []
    for rows in (plan.rows, plan.evaluation):
        shape = _shape(rows, plan.rows)
        known = np.zeros(shape[0] * shape[1])
        for places, batch in sequence_batches(
            rows, plan.config.training.batch_size, plan.pad_id, session.process, session.processes
        ):
            # A process without an answer of a batch runs the model all the same.
            found = row_log_probabilities(session.scorer, batch)
            known[places] = found[: len(places)]
        parts.append(session.scorer.sum(known).reshape(shape))
    return Reference(*parts)


def _shape(rows: Sequence[Row], alike: Sequence[Row]) -> tuple[int, int]:
    return len(rows), len(alike[0].sequences)
