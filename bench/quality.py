"""What a start and ReLoRA do to the loss on held-out rows: random, pissa and olora, each alone, with prune, with merge.

    python bench/quality.py --results quality --table bench/quality.md --plot docs/images/quality.svg

Learning rates first: each start is trained without ReLoRA on the first seed, from 6e-4 on at a third and at three times
the rate for as long as that is better. Then every seed trains each start without ReLoRA, with prune and with merge at
its own best rate, and without ReLoRA at the default rate too. Runs of one seed see the same rows in the same order;
the held-out rows are the same for all, and come from source files that no training row comes from. Every run is
`soup_xb.runs.train.train` on a config, nothing else.

A run that is in the results folder is not repeated, so that the command goes on where it was stopped. After
`--minutes` no further run begins, and the table and the plot show what is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from quality_report import SAME_RATE, Measured, Runs, write_plot, write_table
from quality_rows import LONGEST, write_rows

from soup_xb.core.config.load import config_dict, parse_config
from soup_xb.core.config.schema import LoadedConfig
from soup_xb.core.run.events import EvalEvent, Event, RestartEvent, read_events
from soup_xb.core.run.plan import held_out_batches
from soup_xb.core.run.record import read_record
from soup_xb.data.dataset import load_file
from soup_xb.demo.base import prepare_base
from soup_xb.runs.adapters import TrainedOptions, open_trained
from soup_xb.runs.resume import TrainOptions
from soup_xb.runs.train import train

STRATEGIES = ("random", "pissa", "olora")
MODES = ("prune", "merge")
FIRST_RATE, FACTOR = 6e-4, 3


@dataclass(frozen=True)
class Setting:
    """One run. `mode` is prune, merge, or empty without ReLoRA."""

    strategy: str
    mode: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{self.strategy}-{self.mode or 'plain'}-{self.rate:.1e}-{self.seed}"


class Bench:
    """The results folder with its rows, and the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Write the rows, unless they are there."""
        self.options, self.results = options, options.results
        self.base = options.base or prepare_base()
        self.started, self.spent = time.monotonic(), []
        self.results.mkdir(parents=True, exist_ok=True)
        write_rows(self.base, self.results, options.eval_rows)

    def measured(self, setting: Setting) -> Measured | None:
        """The run of a setting, done now unless it is there; None when the time is over."""
        folder, loaded = self.results / setting.name, self.config(setting)
        if not is_done(folder, loaded):
            if self.time_is_over():
                return None
            self.run(setting, folder, loaded)
        return read_measured(setting, folder)

    def run(self, setting: Setting, folder: Path, loaded: LoadedConfig) -> None:
        """Train; of the adapter its size is kept."""
        wall, cpu = time.monotonic(), time.process_time()
        losses: list[float] = []

        def listen(event: Event) -> None:
            if isinstance(event, EvalEvent):
                losses.append(event.loss)

        outcome = train(loaded, TrainOptions(overwrite=True), [listen])
        sizes = {
            "wall_seconds": time.monotonic() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "adapter_bytes": (outcome.adapter / "adapter_model.safetensors").stat().st_size,
            "saved_rank": json.loads((outcome.adapter / "adapter_config.json").read_text("utf-8"))["r"],
        }
        shutil.rmtree(outcome.adapter)
        (folder / "measured.json").write_text(json.dumps(sizes, indent=2) + "\n", "utf-8")
        self.spent.append(sizes["wall_seconds"])
        self.say(f"{setting.name}: eval {' '.join(f'{loss:.3f}' for loss in losses)}, {self.spent[-1]:.0f} s")

    def time_is_over(self) -> bool:
        """Whether one more run of the usual length would end after the limit."""
        usual = sum(self.spent) / len(self.spent) if self.spent else 0.0
        return time.monotonic() - self.started + usual > 60 * self.options.minutes

    def say(self, text: str) -> None:
        """One line of progress."""
        print(f"[{(time.monotonic() - self.started) / 60:5.1f} min] {text}", file=sys.stderr, flush=True)

    def config(self, setting: Setting) -> LoadedConfig:
        """The config of a run."""
        options = self.options
        training: dict[str, Any] = {
            "max_steps": options.steps,
            "lr": setting.rate,
            "batch_size": options.batch_size,
            "scheduler": "cosine",
            "warmup_ratio": 0.05,
            "precision": "fp32",
            "seed": setting.seed,
            "eval_steps": options.eval_steps,
            "lora": {"r": options.rank, "alpha": 2 * options.rank, "init_strategy": setting.strategy},
        }
        if setting.mode:
            training |= {"relora_steps": options.relora_steps, "relora_mode": setting.mode}
        if setting.mode == "merge":
            training["relora_rewarm_steps"] = max(1, options.relora_steps // 8)
        content = {
            "base": str(self.base),
            "task": "sft",
            "backend": "torch",
            "data": {
                "train": str(self.results / "train.jsonl"),
                "eval": str(self.results / "eval.jsonl"),
                "format": "prompt-completion",
                "max_length": LONGEST,
            },
            "training": training,
            "output": str(self.results / setting.name),
        }
        return parse_config(json.dumps(content), setting.name)


def main() -> None:
    """Do the runs, then write the table and the plot."""
    options = _options()
    bench = Bench(options)
    base_loss = loss_of_base(bench)
    bench.say(f"loss of the base: {base_loss:.4f}")
    best = {strategy: best_rate(bench, strategy) for strategy in STRATEGIES}
    for strategy, rate in best.items():
        bench.say(f"best rate of {strategy}: {rate:.1e}")
    for setting in settings(best, options.seeds):
        if bench.measured(setting) is None:
            bench.say("the time is over; the figures are of the runs that are there")
            break
    runs = Runs(everything(bench), best, base_loss)
    table = write_table(runs)
    print(table)
    if options.table:
        options.table.write_text(table, "utf-8")
    if options.plot:
        write_plot(options.plot, runs)


def settings(best: dict[str, float], seeds: int) -> Iterator[Setting]:
    """What is run after the sweep, in an order that leaves the most to say where the time is short."""
    others = range(1, seeds)
    for some, modes in (((0,), ("", *MODES)), (others, ("",)), (others, MODES)):
        for seed in some:
            for strategy, rate in best.items():
                if "" in modes:
                    yield Setting(strategy, "", SAME_RATE, seed)
                for mode in modes:
                    yield Setting(strategy, mode, rate, seed)


def best_rate(bench: Bench, strategy: str) -> float:
    """The rate with the lowest last loss on the first seed: a third of it and three times it are worse."""
    losses: dict[float, float] = {}

    def loss(rate: float) -> float:
        if rate not in losses:
            run = bench.measured(Setting(strategy, "", rate, 0))
            if run is None:
                sys.exit("the time is over before the sweep is done; the same command goes on")
            losses[rate] = run.last_loss
        return losses[rate]

    best = FIRST_RATE
    while better := next((rate for rate in neighbours(best) if loss(rate) < loss(best)), None):
        best = better
    return best


def neighbours(rate: float) -> Iterator[float]:
    """A third and three times the rate, to the two digits that a run's name has."""
    for factor in (1 / FACTOR, FACTOR):
        yield float(f"{rate * factor:.1e}")


def everything(bench: Bench) -> Iterator[Measured]:
    """Every run of these options that is in the results folder."""
    for folder in sorted(bench.results.iterdir()):
        if not (folder / "measured.json").is_file():
            continue
        strategy, mode, rate = folder.name.split("-", 2)
        rate, _, seed = rate.rpartition("-")
        setting = Setting(strategy, mode.replace("plain", ""), float(rate), int(seed))
        if is_done(folder, bench.config(setting)):
            yield read_measured(setting, folder)


def is_done(folder: Path, loaded: LoadedConfig) -> bool:
    """Whether the folder holds a finished run of just this config."""
    if not (folder / "measured.json").is_file():
        return False
    record = read_record(folder)
    return record.status == "finished" and record.config == config_dict(loaded.config)


def read_measured(setting: Setting, folder: Path) -> Measured:
    """The figures of a finished run."""
    events = read_events(folder / "metrics.jsonl")
    return Measured(
        setting.strategy,
        setting.mode,
        setting.rate,
        setting.seed,
        [(event.step, event.loss) for event in events if isinstance(event, EvalEvent)],
        [event for event in events if isinstance(event, RestartEvent)],
        json.loads((folder / "measured.json").read_text("utf-8")),
    )


def loss_of_base(bench: Bench) -> float:
    """Loss of the base, and so of every start before its first step, on the held-out rows."""
    known = bench.results / "base.json"
    if not known.is_file():
        with open_trained(TrainedOptions("torch", None, str(bench.base))) as opened:
            rows, _ = load_file(bench.results / "eval.jsonl", "prompt-completion", opened.tokenizer, LONGEST)
            batches = held_out_batches(rows, bench.options.batch_size, opened.tokenizer.pad_id)
            loss = opened.session.evaluate(batches, adapter=False).mean
        known.write_text(json.dumps({"loss": loss}) + "\n", "utf-8")
    return float(json.loads(known.read_text("utf-8"))["loss"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("quality"), help="folder of the runs")
    parser.add_argument("--table", type=Path, help="where the table goes, besides the terminal")
    parser.add_argument("--plot", type=Path, help="where the plot goes, an .svg or .png")
    parser.add_argument("--base", type=Path, help="a model folder; default: the demo's base")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--relora-steps", type=int, default=16)
    parser.add_argument("--eval-steps", type=int, default=8)
    parser.add_argument("--eval-rows", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=80, help="no run begins that would end later")
    return parser.parse_args()


if __name__ == "__main__":
    main()
