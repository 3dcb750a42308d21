"""`report.html`: what a run did, on one page that needs no network, with its curves as inline SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

from attrs import frozen

from soup_xb.core.base.coverage_text import CoverageRow
from soup_xb.core.disk import disk_errors, write_text
from soup_xb.core.errors import Problem
from soup_xb.core.run.events import ACCURACIES, EvalEvent, Event, Notice, RestartEvent, StepEvent, read_events
from soup_xb.core.run.folder import REPORT, RunFolder
from soup_xb.core.run.record import RunRecord
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


# matplotlib wants colours that it knows; the page wants variables that follow light and dark.
COLOURS = {
    "#a00001": "var(--text)",
    "#a00002": "var(--muted)",
    "#a00003": "var(--line)",
    "#a00004": "var(--accent)",
    "#a00005": "var(--accent-soft)",
    "#a00006": "var(--eval)",
    "#a00007": "var(--restart)",
    "#a00008": "var(--card)",
}
TEXT, MUTED, LINE, ACCENT, SOFT, EVAL, RESTART, CARD = COLOURS
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "soup-xb",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": TEXT,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "path.simplify": True,
}
MAX_POINTS = 2000
Points = list[tuple[int, float]]


def curves_svg(events: Sequence[Event]) -> str:
    """Loss above, learning rate below, on one axis of steps; empty where no step has a finite loss.

    Between them stands the accuracy of a task that compares texts.

    Raises ImportError where matplotlib is not installed.
    """
    steps = [event for event in events if isinstance(event, StepEvent)]
    if not any(math.isfinite(event.loss) for event in steps):
        return ""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        judged = any(_accuracies(steps))
        figure = Figure(figsize=(9.2, 7.0 if judged else 5.4), layout="constrained")
        FigureCanvasSVG(figure)
        ratios = [3, 1.5, 1] if judged else [3, 1]
        loss, *between, rate = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
        evals = [event for event in events if isinstance(event, EvalEvent)]
        _draw_loss(loss, steps, evals)
        for axes in between:
            _draw_accuracy(axes, steps, evals)
        _draw_rate(rate, steps)
        _mark_restarts(
            (loss, *between, rate), [event.step for event in events if isinstance(event, RestartEvent)]
        )
        loss.legend(frameon=False, loc="upper right", ncols=4, bbox_to_anchor=(1, 1.14), labelcolor=MUTED)
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _inline(buffer.getvalue())


def _draw_loss(axes: Any, steps: Sequence[StepEvent], evals: Sequence[EvalEvent]) -> None:
    points = [(event.step, event.loss) for event in steps if math.isfinite(event.loss)]
    raw = thinned(points, MAX_POINTS)
    axes.scatter(
        *zip(*raw, strict=True), s=_dot_size(len(raw)), color=SOFT, linewidths=0, label="loss of a step"
    )
    axes.plot(
        *zip(*thinned(smoothed(points), MAX_POINTS), strict=True),
        color=ACCENT,
        linewidth=1.9,
        label="smoothed",
    )
    held_out = [(event.step, event.loss) for event in evals if math.isfinite(event.loss)]
    if held_out:
        style = {"markersize": 5.5, "markeredgecolor": CARD, "markeredgewidth": 0.8, "linewidth": 1.2}
        axes.plot(*zip(*held_out, strict=True), color=EVAL, marker="o", label="evaluation", **style)
    axes.set_ylabel("loss")
    axes.margins(x=0.01, y=0.08)


def _accuracies(events: Sequence[StepEvent] | Sequence[EvalEvent]) -> Points:
    return [(event.step, event.means[name]) for event in events for name in ACCURACIES if name in event.means]


def _draw_accuracy(axes: Any, steps: Sequence[StepEvent], evals: Sequence[EvalEvent]) -> None:
    points = _accuracies(steps)
    raw = thinned(points, MAX_POINTS)
    axes.scatter(*zip(*raw, strict=True), s=_dot_size(len(raw)), color=SOFT, linewidths=0)
    axes.plot(*zip(*thinned(smoothed(points), MAX_POINTS), strict=True), color=ACCENT, linewidth=1.9)
    held_out = _accuracies(evals)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=EVAL, marker="o", markersize=5.5, linewidth=1.2)
    axes.set_ylim(-0.05, 1.05)
    axes.set_ylabel("accuracy")


def _draw_rate(axes: Any, steps: Sequence[StepEvent]) -> None:
    points = thinned([(event.step, event.learning_rate) for event in steps], MAX_POINTS)
    axes.plot(*zip(*points, strict=True), color=MUTED, linewidth=1.4)
    axes.set_ylim(bottom=0, top=max(rate for _, rate in points) * 1.15 or 1)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=False)
    axes.yaxis.get_offset_text().set_color(MUTED)
    axes.set_ylabel("learning rate")
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _mark_restarts(both: Sequence[Any], steps: Sequence[int]) -> None:
    for axes in both:
        for number, step in enumerate(steps):
            label = "restart" if number == 0 else None
            axes.axvline(step + 0.5, color=RESTART, linewidth=1.1, linestyle=(0, (3, 3)), label=label)


def smoothed(points: Points) -> Points:
    """The mean over a tenth of the steps, centred; at the steep start the stretch is narrower, to follow it.

    >>> smoothed([(1, 2.0), (2, 4.0), (3, 0.0)])
    [(1, 2.0), (2, 2.0), (3, 2.0)]
    """
    half = max(1, min(100, len(points) // 20))
    sums = [0.0, *accumulate(value for _, value in points)]
    result = []
    for index, (step, _) in enumerate(points):
        start = index - min(half, index)
        end = min(len(points), index + min(half, index) + 1)
        result.append((step, (sums[end] - sums[start]) / (end - start)))
    return result


def thinned(points: Points, most: int) -> Points:
    """At most `most` points: the lowest and the highest of each stretch, so that spikes stay.

    >>> thinned([(1, 5.0), (2, 9.0), (3, 1.0), (4, 5.0)], 2)
    [(2, 9.0), (3, 1.0)]
    """
    if len(points) <= most:
        return points
    stretch = math.ceil(len(points) / (most // 2))
    result = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        result.extend(sorted(ends))
    return result


def _dot_size(count: int) -> float:
    return max(5.0, min(26.0, 4000 / count))


def _inline(svg: str) -> str:
    """An SVG file as an element of a page: no prolog, no addresses, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    label = 'role="img" aria-label="Loss and learning rate by step"'
    svg = svg.replace("<svg", f"<svg {label}", 1)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg
