"""The first steps of a run on both engines, side by side: the proof of "the same numbers"."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, frozen

from soup_xb.backends import choose_backend
from soup_xb.core.config.load import LoadedConfig, dump_config
from soup_xb.core.errors import ConfigError, Problem, SoupError
from soup_xb.core.process import python_command
from soup_xb.core.run.events import Event, StepEvent
from soup_xb.core.run.loop import Hooks, run_loop
from soup_xb.core.tasks import TASKS
from soup_xb.runs.open import open_run
from soup_xb.runs.reference import computed_reference

ENGINES = ("torch", "mlx")
LOSS_BOUND = 1e-3
# Share of the largest logit: float32's own noise between two libraries' summation orders.
LOGITS_BOUND = 1e-5
_PROBE_TOKENS = 64
_LOSSES, _LOGITS = "losses.json", "logits.npy"


@frozen(eq=False)
class Measured:
    """One engine's run: base logits (length, vocabulary) of the first row's first tokens, and a loss for each step."""

    logits: np.ndarray[Any, Any]
    losses: tuple[float, ...]


@frozen
class Parity:
    """Both engines' losses and how far the engines are apart; `largest_logit` is torch's, by absolute value."""

    losses: dict[str, tuple[float, ...]]
    logits_difference: float
    largest_logit: float
    exact_settings: bool

    @property
    def loss_difference(self) -> float:
        """The largest difference of a step's losses."""
        first, second = self.losses.values()
        return max(abs(one - other) for one, other in zip(first, second, strict=True))

    @property
    def same(self) -> bool:
        """Whether losses and base logits are within the bounds."""
        return self.loss_difference <= LOSS_BOUND and self.logits_difference <= self.logits_bound

    @property
    def logits_bound(self) -> float:
        """The bound for the base's logits."""
        return LOGITS_BOUND * max(1.0, self.largest_logit)


def measure(loaded: LoadedConfig, steps: int, folder: Path) -> None:
    """Do the first steps on the config's backend and write what `compare` reads."""
    with open_run(loaded, choose_backend(loaded)) as run:
        probe = run.plan.rows[0].sequences[0].tokens[None, :_PROBE_TOKENS]
        logits = run.session.logits(probe, adapter=False)[0]
        run.session.attach(run.plan.adapters)
        losses: list[float] = []

        def keep(event: Event) -> None:
            if isinstance(event, StepEvent):
                losses.append(event.loss)

        task = TASKS[loaded.config.task]
        plan = evolve(run.plan, reference=computed_reference(run)) if task.needs_reference else run.plan
        shortened = evolve(plan, total_steps=min(steps, plan.total_steps), eval_steps=(), save_steps=())
        run_loop(shortened, run.session, Hooks(emit=keep, save=lambda _: None, stop=lambda: 0))
    np.save(folder / _LOGITS, logits, allow_pickle=False)
    (folder / _LOSSES).write_text(json.dumps(losses), "utf-8")


def compare(loaded: LoadedConfig, steps: int) -> Parity:
    """Run both engines, each in a process of its own, one after the other.

    Raises ConfigError with every refusal of either engine before anything is loaded, and passes on what
    ended an engine's run.
    """
    files = [evolve(loaded, config=evolve(loaded.config, backend=engine)) for engine in ENGINES]
    refused: list[Problem] = []
    for file in files:
        try:
            choose_backend(file)
        except ConfigError as error:
            refused += error.problems
    if refused:
        raise ConfigError.of(refused)
    torch, mlx = (_in_a_process(file, steps) for file in files)
    return Parity(
        losses=dict(zip(ENGINES, (torch.losses, mlx.losses), strict=True)),
        logits_difference=float(np.abs(torch.logits - mlx.logits).max()),
        largest_logit=float(np.abs(torch.logits).max()),
        exact_settings=_is_exact(loaded),
    )


def _in_a_process(loaded: LoadedConfig, steps: int) -> Measured:
    with tempfile.TemporaryDirectory(prefix="soupx-parity-") as place:
        folder = Path(place)
        config = folder / "soup.yaml"
        config.write_text(dump_config(loaded.config), "utf-8")
        words = ["parity", str(config), "--steps", str(steps), "--measure-into", place]
        done = subprocess.run(
            [*python_command("from soup_xb.cli import run; run()"), *words],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise _passed_on(loaded.config.backend, done)
        losses = json.loads((folder / _LOSSES).read_text("utf-8"))
        return Measured(np.load(folder / _LOGITS, allow_pickle=False), tuple(losses))


def _passed_on(engine: str, done: subprocess.CompletedProcess[str]) -> SoupError:
    kind = next(
        (kind for kind in SoupError.__subclasses__() if kind.exit_code == done.returncode), ConfigError
    )
    lines = [line for line in done.stderr.strip().splitlines() if line] or ["it printed nothing"]
    return kind(
        "parity-run-failed", f"the {engine} engine stopped with exit code {done.returncode}: {lines[-1]}"
    )


def _is_exact(loaded: LoadedConfig) -> bool:
    training = loaded.config.training
    return (
        training.lora.dropout == 0
        and training.quantization == "none"
        and training.precision in ("auto", "fp32")
    )


def curves_svg(losses: Mapping[str, Sequence[float]]) -> str:
    """Both loss curves, and their difference on a logarithmic scale, as inline SVG."""
    import io

    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "font.size": 11}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        steps = range(1, len(next(iter(losses.values()))) + 1)
        for (engine, values), style in zip(losses.items(), ("-", "--"), strict=True):
            upper.plot(steps, values, style, label=engine)
        upper.set_ylabel("loss")
        upper.legend()
        first, second = losses.values()
        lower.semilogy(
            steps, [max(abs(a - b), 1e-9) for a, b in zip(first, second, strict=True)], color="0.3"
        )
        lower.axhline(LOSS_BOUND, linestyle=":", color="firebrick", label=f"bound {LOSS_BOUND:g}")
        lower.set_ylabel("difference")
        lower.set_xlabel("step")
        lower.legend()
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
