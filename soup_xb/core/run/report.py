"""`report.html`: what a run did, on one page that needs no network."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path

from attrs import frozen

from soup_xb.core.base.coverage_text import CoverageRow
from soup_xb.core.disk import disk_errors, write_text
from soup_xb.core.errors import Problem
from soup_xb.core.run.events import ACCURACIES, EvalEvent, Event, Notice, RestartEvent, StepEvent
from soup_xb.core.run.folder import REPORT, RunFolder
from soup_xb.core.run.metrics import read_events
from soup_xb.core.run.record import RunRecord
from soup_xb.core.run.report_curves import curves_svg
from soup_xb.core.text import bytes_text, count_text, duration_text, rate_text

__all__ = ["ModuleRow", "ReportFacts", "Sample", "read_events", "write_report"]

TEMPLATE = "report.html.jinja"
OUTCOMES = {
    "finished": "finished",
    "running": "still running",
    "interrupted": "interrupted",
    "failed": "failed",
}


@frozen
class ModuleRow:
    """A group of modules that share one name and one set of numbers; `parameters` is of the whole group."""

    name: str
    count: int
    rank: int
    alpha: float
    scale: float
    parameters: int


@frozen
class Sample:
    """One prompt with the answer of the base and of the tuned model."""

    prompt: str
    base: str
    tuned: str


@frozen
class ReportFacts:
    """Everything on the page; `settings` is the resolved YAML, `coverage` what of the base is adapted."""

    record: RunRecord
    events: Sequence[Event]
    modules: Sequence[ModuleRow]
    settings: str
    samples: Sequence[Sample] = ()
    coverage: Sequence[CoverageRow] = ()


@frozen
class Figure:
    """One number of the headline strip."""

    label: str
    value: str
    detail: str = ""


def write_report(folder: RunFolder | Path, facts: ReportFacts) -> Path:
    """Write `report.html` into an output folder in one piece and return its path. Raises ResourceError."""
    path = (folder.path if isinstance(folder, RunFolder) else folder) / REPORT
    page = report_html(facts)
    with disk_errors(path, len(page)):
        write_text(path, page)
    return path


def report_html(facts: ReportFacts) -> str:
    """The page. Everything that comes from a file or a model is escaped."""
    import jinja2
    from markupsafe import Markup, escape

    try:
        curves, missing = curves_svg(facts.events), ""
    except ImportError:
        curves, missing = "", "matplotlib is not installed, so this report has no curves."
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["marked"] = lambda text: Markup(
        re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    )
    environment.filters |= {
        "count": count_text,
        "duration": duration_text,
        "rate": rate_text,
        "loss": _loss_text,
        "mean": lambda mean: "—" if mean is None else _loss_text(mean),
    }
    evals = [event for event in facts.events if isinstance(event, EvalEvent)]
    source = files("soup_xb.core.run").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        facts=facts,
        record=facts.record,
        outcome=OUTCOMES[facts.record.status],
        figures=figures(facts),
        # Made by matplotlib from numbers alone; no text of a file or a model is in it.
        curves=Markup(curves),
        curves_missing=missing,
        evals=evals,
        eval_means=list(dict.fromkeys(name for event in evals for name in event.means)),
        has_perplexity=any(not math.isnan(event.perplexity) for event in evals),
        restarts=[event for event in facts.events if isinstance(event, RestartEvent)],
        notices=_notices(facts.events),
        started=_time_text(facts.record.started),
        base_name=_base_name(facts.record.base),
    )


def figures(facts: ReportFacts) -> list[Figure]:
    """The headline strip: how the loss went, how far, how fast, on what."""
    record = facts.record
    losses = [event.loss for event in facts.events if isinstance(event, StepEvent)]
    evals = [event for event in facts.events if isinstance(event, EvalEvent)]
    strip = []
    if losses:
        last = losses[-max(1, min(10, len(losses) // 10)) :]
        detail = f"mean of the last {len(last)}" if len(last) > 1 else "last step"
        strip.append(Figure("Loss", f"{_loss_text(losses[0])} → {_loss_text(sum(last) / len(last))}", detail))
    if evals:
        best = min(evals, key=lambda event: event.loss if math.isfinite(event.loss) else math.inf)
        detail = "the lowest" if best is evals[-1] else f"lowest {_loss_text(best.loss)} at step {best.step}"
        strip.append(Figure("Evaluation loss", _loss_text(evals[-1].loss), detail if len(evals) > 1 else ""))
    strip += [
        Figure("Evaluation accuracy", f"{evals[-1].means[name]:.0%}", detail)
        for name, detail in zip(ACCURACIES, ("answers on their side", "positives nearest"), strict=True)
        if evals and name in evals[-1].means
    ]
    steps = (
        f"{record.steps:,}"
        if record.steps == record.total_steps
        else f"{record.steps:,} of {record.total_steps:,}"
    )
    strip += [Figure("Steps", steps), Figure("Training time", duration_text(record.train_seconds))]
    if record.tokens_per_second > 0:
        strip.append(
            Figure("Tokens per second", f"{record.tokens_per_second:,.0f}", "real tokens, no padding")
        )
    if record.peak_memory_bytes:
        strip.append(Figure("Peak memory", bytes_text(record.peak_memory_bytes)))
    parameters = sum(row.parameters for row in facts.modules)
    if parameters:
        strip.append(Figure("Adapter", count_text(parameters), "trained parameters"))
    return [*strip, Figure("Backend", record.backend, record.versions.get(record.backend, ""))]


def _notices(events: Sequence[Event]) -> list[tuple[Problem, bool]]:
    seen = [(event.problem, event.warning) for event in events if isinstance(event, Notice)]
    # A resumed run says again what the first start said.
    return list(dict.fromkeys(seen))


def _loss_text(loss: float) -> str:
    if not math.isfinite(loss):
        return "—"
    return f"{loss:.4f}" if abs(loss) < 1000 else f"{loss:.3g}"


def _time_text(iso: str) -> str:
    try:
        time = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{time.day} {time:%B %Y, %H:%M}"


def _base_name(base: str) -> str:
    return base if base.count("/") == 1 and not base.startswith(("/", ".", "~")) else Path(base).name or base
