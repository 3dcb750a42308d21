"""Tokens per second of `soupx train` and of transformers' Trainer + PEFT, doing the same work.

    python bench/sft_vs_trainer.py --rows 128 --rounds 3 --adapter qv

Rows, steps, adapter and precision are the same. Each side runs in its own process, in turn (Trainer, soupx,
Trainer, soupx, ...). The time is the whole training loop's, tokens are real ones (no padding), memory is the
process's largest resident size. The bars: a median ratio of 1.4, no more memory than Trainer, 60% of the
matrix-product peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from child import run_child
from rows import docstring_rows
from work import Sizes, step_flops

from soup_xb.demo.base import prepare_base

HERE = Path(__file__).parent
ADAPTERS: dict[str, str | list[str]] = {"qv": ["q_proj", "v_proj"], "all-linear": "all-linear"}
RATE, RANK, ALPHA, SEED = 2e-4, 8, 16, 0


def main() -> None:
    """Run the rounds and print one line for each, then the figures."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="sft-vs-trainer-") as place:
        task = _task(options, Path(place))
        pairs, peaks = [], [_peak()]
        for number in range(1, options.rounds + 1):
            trainer = _trainer(task)
            # The rows' tokens, counted once: what one side adds around them is no work done.
            soupx = {**trainer, **soupx_side(task, Path(place) / f"soupx-{number}", "torch")}
            pairs.append((trainer, soupx))
            peaks.append(_peak())
            _print_round(number, trainer, soupx)
        _print_figures(pairs, max(peaks), Sizes.of(Path(task["base"])))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=128, help="different training rows")
    parser.add_argument("--steps", type=int, help="optimizer updates; default: one pass over the rows")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapter", choices=ADAPTERS, default="qv")
    parser.add_argument("--base", type=Path, help="a model folder; default: the demo's base")
    options = parser.parse_args()
    options.steps = options.steps or options.rows // options.batch_size
    # Whole passes over the rows: then both sides see the same tokens, whatever their order.
    options.rows = min(options.rows, options.steps * options.batch_size)
    if options.steps * options.batch_size % options.rows:
        parser.error("steps x batch size must be a whole number of passes over the rows")
    return options


def _task(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    base = options.base or prepare_base()
    task = {
        "base": str(base),
        "rows": str(place / "rows.jsonl"),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "targets": ADAPTERS[options.adapter],
        "rate": RATE,
        "rank": RANK,
        "alpha": ALPHA,
        "seed": SEED,
        "output": str(place / "trainer"),
    }
    rows = fitting_rows(base, options.rows, options.max_length)
    Path(task["rows"]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(
        f"{options.rows} rows, {options.steps} steps of {options.batch_size}, r {RANK} on {options.adapter}"
    )
    return task


def fitting_rows(base: Path, count: int, max_length: int) -> list[dict[str, str]]:
    """Rows that need no truncation, spread evenly, so that both sides train on every token of them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    # The chat template's own tokens take about 40.
    rows = [
        row
        for row in docstring_rows(max(1300, 2 * count))
        if len(tokenizer.encode("\n\n".join(row.values())).ids) <= max_length - 48
    ]
    return [rows[index * len(rows) // count] for index in range(count)]


def _trainer(task: dict[str, Any]) -> dict[str, float]:
    child = run_child([sys.executable, str(HERE / "trainer_side.py"), json.dumps(task)])
    return {**json.loads(child.last_line), "memory": child.peak_bytes, "process_seconds": child.seconds}


def soupx_side(task: dict[str, Any], output: Path, backend: str) -> dict[str, float]:
    """One run of `soupx train`: its loop's seconds and mean loss, its process's memory and seconds."""
    config = output.with_suffix(".yaml")
    config.write_text(json.dumps(_soupx_config(task, output)), encoding="utf-8")
    child = run_child([sys.executable, "-m", "soup_xb", "train", str(config), "--backend", backend])
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    targets = sum(step["target_tokens"] for step in steps)
    return {
        "seconds": record["train_seconds"],
        "target_tokens": targets,
        "loss": sum(step["loss"] * step["target_tokens"] for step in steps) / targets,
        "memory": child.peak_bytes,
        "process_seconds": child.seconds,
    }


def _soupx_config(task: dict[str, Any], output: Path) -> dict[str, Any]:
    targets = "auto" if task["targets"] == "all-linear" else task["targets"]
    return {
        "base": task["base"],
        "task": "sft",
        "data": {
            "train": task["rows"],
            "format": "alpaca",
            "max_length": task["max_length"],
            "val_split": 0.0,
        },
        "training": {
            "max_steps": task["steps"],
            "lr": task["rate"],
            "batch_size": task["batch_size"],
            "scheduler": "linear",
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
            "precision": "fp32",
            "seed": task["seed"],
            "lora": {"r": task["rank"], "alpha": task["alpha"], "target_modules": targets},
        },
        "output": str(output),
    }


def _peak() -> float:
    return float(run_child([sys.executable, str(HERE / "work.py")]).last_line)


def _print_round(number: int, trainer: dict[str, float], soupx: dict[str, float]) -> None:
    for name, side in (("Trainer", trainer), ("soupx", soupx)):
        print(
            f"round {number}  {name:8}{_rate(side):8.1f} tokens/s  loop {side['seconds']:6.1f} s  "
            f"process {side['process_seconds']:6.1f} s  {side['memory'] / 2**20:6.0f} MiB  "
            f"{side['tokens']:.0f} tokens ({side['target_tokens']:.0f} trained)  mean loss {side['loss']:.4f}"
        )
    print(f"round {number}  ratio {_rate(soupx) / _rate(trainer):.2f}", flush=True)


def _print_figures(pairs: list[tuple[dict[str, float], dict[str, float]]], peak: float, sizes: Sizes) -> None:
    ratios = [_rate(soupx) / _rate(trainer) for trainer, soupx in pairs]
    memory = [max(side["memory"] for side in sides) / 2**20 for sides in zip(*pairs, strict=True)]
    print(f"tokens/s, soupx over Trainer: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    print(f"median ratio {statistics.median(ratios):.2f} (bar 1.40)")
    print(f"peak memory: Trainer {memory[0]:.0f} MiB, soupx {memory[1]:.0f} MiB (bar: no higher)")
    print(f"matrix-product peak {peak / 1e9:.0f} GFLOP/s (best of 5 a round)")
    for name, index in (("Trainer", 0), ("soupx", 1)):
        work = [
            step_flops(sizes, side["tokens"], side["target_tokens"], side["squared_lengths"])
            for side in (pair[index] for pair in pairs)
        ]
        shares = [flops / pair[index]["seconds"] / peak for flops, pair in zip(work, pairs, strict=True)]
        print(f"share of that peak, {name}: {statistics.median(shares):.0%}" + " (bar 60%)" * index)


def _rate(side: dict[str, float]) -> float:
    return side["tokens"] / side["seconds"]


if __name__ == "__main__":
    main()
