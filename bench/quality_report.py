"""The table and the plot of `quality.py`: means over seeds, with how far the seeds lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soup_xb.core.run.events import RestartEvent

STRATEGIES = {"random": "#4c6a92", "pissa": "#c0562b", "olora": "#3f8f5f"}
MODES = {"": "without ReLoRA", "prune": "ReLoRA, prune", "merge": "ReLoRA, merge"}
# The default of `training.lr`.
SAME_RATE = 2e-4
INK, GRID = "#57606a", "#d8dee4"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "soup-xb",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class Measured:
    """One finished run. `mode` is empty without ReLoRA; `evals` are steps with their held-out loss.

    The held-out loss of a restart's own step is the one after the restart. `sizes` has `wall_seconds`, `cpu_seconds`,
    `adapter_bytes` and `saved_rank`.
    """

    strategy: str
    mode: str
    rate: float
    seed: int
    evals: list[tuple[int, float]]
    restarts: list[RestartEvent]
    sizes: dict[str, float]

    @property
    def last_loss(self) -> float:
        """Held-out loss after the last step."""
        return self.evals[-1][1]

    def loss_at(self, step: int) -> float:
        """Held-out loss at the end of a step."""
        return dict(self.evals)[step]

    def steps_to(self, loss: float, base_loss: float) -> float | None:
        """The step at which the held-out loss first is `loss`, on straight lines between evaluations."""
        before, height = 0, base_loss
        for step, value in self.evals:
            if value <= loss:
                return before + (step - before) * (height - loss) / (height - value)
            before, height = step, value
        return None


class Runs:
    """All finished runs, with each start's best rate and the loss of the base."""

    def __init__(self, runs: Iterable[Measured], best: dict[str, float], base_loss: float) -> None:
        """Hold them."""
        self.all, self.best, self.base_loss = list(runs), best, base_loss

    def of(self, strategy: str, mode: str, rate: float) -> list[Measured]:
        """The runs of one line of a table, by seed."""
        found = [run for run in self.all if (run.strategy, run.mode, run.rate) == (strategy, mode, rate)]
        return sorted(found, key=lambda run: run.seed)

    def steps_to_random(self, found: Sequence[Measured], rate: float) -> str:
        """Steps to the last loss of the random start at `rate`, each seed against its own; the mean as text."""
        goals = {run.seed: run.last_loss for run in self.of("random", "", rate)}
        steps = [run.steps_to(goals[run.seed], self.base_loss) for run in found if run.seed in goals]
        reached = [step for step in steps if step is not None]
        if not reached:
            return "not reached"
        few = "" if len(reached) == len(steps) else f" ({len(reached)} of {len(steps)} seeds)"
        return f"{statistics.mean(reached):.0f}{few}"

    def above_plain(self, found: Sequence[Measured]) -> str:
        """How much higher the last loss is than without ReLoRA at the same rate, each seed against its own."""
        plain = {run.seed: run.last_loss for run in self.of(found[0].strategy, "", found[0].rate)}
        return spread([run.last_loss - plain[run.seed] for run in found if run.seed in plain])

    def first_restart(self, found: Sequence[Measured]) -> str:
        """Held-out loss before and after the first restart; until then a run is the one without ReLoRA."""
        step = found[0].restarts[0].step
        plain = {run.seed: run.loss_at(step) for run in self.of(found[0].strategy, "", found[0].rate)}
        known = [run for run in found if run.seed in plain]
        before = statistics.mean(plain[run.seed] for run in known)
        return f"{before:.3f} to {statistics.mean(run.loss_at(step) for run in known):.3f}"

    def panels(self) -> Iterator[tuple[str, str, Callable[[str], float]]]:
        """Each group of lines that belongs together: title, mode and the rate of a start."""
        yield "without ReLoRA, each start at its best rate", "", self.best.__getitem__
        yield f"without ReLoRA, all at the default rate, {SAME_RATE:g}", "", lambda strategy: SAME_RATE
        yield "ReLoRA, prune, each start at its best rate", "prune", self.best.__getitem__
        yield "ReLoRA, merge, each start at its best rate", "merge", self.best.__getitem__


def write_table(runs: Runs) -> str:
    """Three tables in Markdown: learning rates on the first seed; the starts; ReLoRA. Means over seeds, ± sd."""
    return f"{_rates_table(runs)}\n{_starts_table(runs)}\n{_relora_table(runs)}"


def _rates_table(runs: Runs) -> str:
    """Last loss, and the steps to the last loss of the random start at the same rate."""
    sweep = {(run.strategy, run.rate): run for run in runs.all if not run.mode and run.seed == 0}
    rates = sorted({rate for _, rate in sweep})
    lines = [
        "| start, seed 0, without ReLoRA | " + " | ".join(f"lr {rate:g}" for rate in rates) + " |",
        "|---|" + "---|" * len(rates),
    ]
    for strategy in STRATEGIES:
        cells = []
        for rate in rates:
            run, random = sweep.get((strategy, rate)), sweep.get(("random", rate))
            text = f"{run.last_loss:.3f}" if run else ""
            if run and random and run is not random:
                steps = run.steps_to(random.last_loss, runs.base_loss)
                text += "; not reached" if steps is None else f"; {steps:.0f} steps"
            cells.append(f"**{text}**" if run and rate == runs.best[strategy] else text)
        lines.append(f"| {strategy} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _starts_table(runs: Runs) -> str:
    best = runs.best["random"]
    lines = [
        "| start | lr | seeds | held-out loss at the end "
        f"| steps to random's last loss at lr {best:g} | at lr {SAME_RATE:g} | CPU seconds | saved adapter |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for strategy in STRATEGIES:
        for rate in dict.fromkeys((runs.best[strategy], SAME_RATE)):
            if found := runs.of(strategy, "", rate):
                goals = [runs.steps_to_random(found, goal) for goal in (best, SAME_RATE)]
                lines.append(_line(found, [f"{rate:g}", str(len(found)), _end(found), *goals]))
    return "\n".join(lines) + "\n"


def _relora_table(runs: Runs) -> str:
    lines = [
        "| start | lr | ReLoRA | seeds | held-out loss at the end | higher than without, same seeds "
        "| held-out loss at the first restart | steps to random's last loss | CPU seconds | saved adapter |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for strategy, rate in runs.best.items():
        for mode in ("", "prune", "merge"):
            if found := runs.of(strategy, mode, rate):
                restarts = [runs.above_plain(found), runs.first_restart(found)] if mode else ["-", "-"]
                goal = runs.steps_to_random(found, runs.best["random"])
                lines.append(
                    _line(found, [f"{rate:g}", mode or "-", str(len(found)), _end(found), *restarts, goal])
                )
    return "\n".join(lines) + "\n"


def _line(found: Sequence[Measured], cells: Sequence[str]) -> str:
    sizes = found[0].sizes
    seconds = f"{statistics.mean(run.sizes['cpu_seconds'] for run in found):.0f}"
    saved = f"rank {sizes['saved_rank']:.0f}, {sizes['adapter_bytes'] / 2**20:.0f} MiB"
    return f"| {' | '.join([found[0].strategy, *cells, seconds, saved])} |"


def _end(found: Sequence[Measured]) -> str:
    return spread([run.last_loss for run in found])


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation (of a sample); the mean alone of one value."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def write_plot(path: Path, runs: Runs) -> None:
    """Held-out loss by step, the mean over seeds in the band of the lowest and the highest; one panel a mode."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 6.4), layout="constrained")
        grid = figure.subplots(2, 2, sharex=True, sharey=True)
        for axes, (title, mode, rate) in zip(grid.flat, runs.panels(), strict=True):
            lines = [found for name in STRATEGIES if (found := runs.of(name, mode, rate(name)))]
            for found in lines:
                _draw(axes, found, runs.base_loss)
            for step in {restart.step for found in lines for restart in found[0].restarts}:
                axes.axvline(step, color=INK, linewidth=0.9, linestyle=(0, (3, 3)), zorder=0)
            axes.set_title(title, fontsize=9.5, loc="left")
            if lines:
                axes.legend(frameon=False, loc="upper right")
        for axes in grid[1]:
            axes.set_xlabel("step")
        for axes in grid[:, 0]:
            axes.set_ylabel("held-out loss")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw(axes: Any, found: Sequence[Measured], base_loss: float) -> None:
    first = found[0]
    colour = STRATEGIES[first.strategy]
    steps = [0, *(step for step, _ in first.evals)]
    columns = [
        [base_loss] * len(found),
        *zip(*([loss for _, loss in run.evals] for run in found), strict=True),
    ]
    means = [statistics.mean(column) for column in columns]
    label = f"{first.strategy}, lr {first.rate:g}"
    axes.fill_between(
        steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15, linewidth=0
    )
    axes.plot(steps, means, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=label)
