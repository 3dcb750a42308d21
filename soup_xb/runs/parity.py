"""The first steps of a run on both engines, side by side: the proof of "the same numbers"."""

from __future__ import annotations

import json
import math
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
from soup_xb.core.rows.batches import collate
from soup_xb.core.run.events import Event, StepEvent
from soup_xb.core.run.loop import Hooks, run_loop
from soup_xb.core.tasks import TASKS
from soup_xb.runs.open import OpenRun, open_run
from soup_xb.runs.rewards import open_rewards, session_for

ENGINES = ("torch", "mlx")
LOSS_BOUND = 1e-3
# Share of the largest logit: float32's own noise between two libraries' summation orders.
LOGITS_BOUND = 1e-5
Array = np.ndarray[Any, Any]
_PROBE_TOKENS = 64
_STEPS, _PROBE = "steps.json", "probe.npy"


@frozen(eq=False)
class Measured:
    """One engine's run: what the base gives for the first row's first tokens, and loss and means of each step.

    `probe` is logits (length, vocabulary), or a vector (width,) for a task that embeds.
    """

    probe: Array
    losses: tuple[float, ...]
    means: tuple[Mapping[str, float], ...]


@frozen
class Parity:
    """Both engines' losses and how far the engines are apart; `largest_logit` is torch's, by absolute value.

    `means_differences` has the largest difference in a step of each mean that the task tells (accuracy, reward, KL);
    infinite where one engine alone tells it. For a task that embeds, logits are the numbers of a vector.
    """

    losses: dict[str, tuple[float, ...]]
    means_differences: dict[str, float]
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
        """Whether losses, means and base logits are within the bounds."""
        apart = max([self.loss_difference, *self.means_differences.values()])
        return apart <= LOSS_BOUND and self.logits_difference <= self.logits_bound

    @property
    def logits_bound(self) -> float:
        """The bound for the base's logits."""
        return LOGITS_BOUND * max(1.0, self.largest_logit)


def measure(loaded: LoadedConfig, steps: int, folder: Path) -> None:
    """Do the first steps on the config's backend and write what `compare` reads."""
    backend = choose_backend(loaded)
    with open_rewards(loaded, backend[0]) as rewards, open_run(loaded, backend) as run:
        probe = _probe(run)
        session = session_for(run, rewards)
        run.session.attach(run.plan.adapters)
        told: list[tuple[float, Mapping[str, float]]] = []

        def keep(event: Event) -> None:
            if isinstance(event, StepEvent):
                told.append((event.loss, dict(event.means)))

        task = TASKS[loaded.config.task]
        plan = evolve(run.plan, reference=run.reference()) if task.needs_reference else run.plan
        shortened = evolve(plan, total_steps=min(steps, plan.total_steps), eval_steps=(), save_steps=())
        run_loop(shortened, session, Hooks(emit=keep, save=lambda _: None, stop=lambda: 0))
    np.save(folder / _PROBE, probe, allow_pickle=False)
    (folder / _STEPS).write_text(json.dumps(told), "utf-8")


def _probe(run: OpenRun) -> Array:
    """What the base gives for the first tokens of the first row."""
    first = run.plan.rows[0].sequences[0]
    if run.session.embedder is not None:
        vectors = run.session.embedder.embeddings(collate([first], run.plan.pad_id), adapter=False)
        return np.asarray(vectors[0])
    return np.asarray(run.session.logits(first.tokens[None, :_PROBE_TOKENS], adapter=False)[0])


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
        means_differences=means_differences(torch.means, mlx.means),
        logits_difference=float(np.abs(torch.probe - mlx.probe).max()),
        largest_logit=float(np.abs(torch.probe).max()),
        exact_settings=_is_exact(loaded),
    )


def means_differences(
    first: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """The largest difference of each mean in a step of two runs, infinite where one of them alone tells it.

    >>> means_differences([{"reward": 0.5}, {"reward": 0.75}], [{"reward": 0.5}, {"reward": 1.0, "kl": 0.0}])
    {'reward': 0.25, 'kl': inf}
    """
    names = dict.fromkeys(name for run in (first, second) for means in run for name in means)
    return {
        name: max(
            abs(one[name] - other[name]) if name in one and name in other else math.inf
            for one, other in zip(first, second, strict=True)
            if name in one or name in other
        )
        for name in names
    }


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
        told = json.loads((folder / _STEPS).read_text("utf-8"))
        return Measured(
            np.load(folder / _PROBE, allow_pickle=False),
            losses=tuple(loss for loss, _ in told),
            means=tuple(means for _, means in told),
        )


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
