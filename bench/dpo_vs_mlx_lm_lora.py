"""Tokens per second of DPO with `soupx train --backend mlx` and with `mlx_lm_lora.train`, with the same BLAS.

    python -m venv /tmp/mlx-lm-lora
    /tmp/mlx-lm-lora/bin/pip install "mlx[cpu]" mlx-lm mlx-lm-lora scipy-openblas32 --editable .
    python bench/dpo_vs_mlx_lm_lora.py --python /tmp/mlx-lm-lora/bin/python --rows 64 --rounds 3

Pairs, steps, adapter (all linear layers of all blocks), loss and precision are the same; neither side evaluates. Each
side runs in its own process, in turn. The time is the whole training loop's, compilation included, and that of the
reference: mlx-lm-lora asks a second copy of the base at each step, soupx asks its base for all answers before the first
one. Tokens are real ones (no padding) of both answers with their prompts; mlx-lm-lora draws each step's batch anew, so
that its tokens are counted. Memory is the process's largest resident size. The bar: a median ratio of 1.3.

Where others use the machine, run it with OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 and go by the processor time, which
waiting has no part in.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from child import run_child
from rows import pair_rows
from sft_vs_trainer import ALPHA, RANK, RATE, SEED

from soup_xb.demo.base import prepare_base

HERE = Path(__file__).parent
_OWN_SIDE = "--own-side"


def main() -> None:
    """Run the rounds and print one line for each side, then the figures."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="dpo-vs-mlx-lm-lora-") as place:
        task = _task(options, Path(place))
        ratios, by_work, memory = [], [], []
        for number in range(1, options.rounds + 1):
            theirs = _mlx_lm_lora(task, options.python, f"mlx-lm-lora-{number}")
            ours = _soupx(task, Path(place) / f"soupx-{number}")
            ratios.append(_rate(ours) / _rate(theirs))
            by_work.append(_rate(ours, "cpu_seconds") / _rate(theirs, "cpu_seconds"))
            memory.append((theirs["memory"], ours["memory"]))
            for name, side in (("mlx_lm_lora", theirs), ("soupx", ours)):
                print(
                    f"round {number}  {name:12} {_rate(side):8.1f} tokens/s  {side['steps']} steps in "
                    f"{side['seconds']:6.1f} s, {side['cpu_seconds']:.1f} s of processors  "
                    f"{side['tokens']} tokens  {side['memory'] / 2**20:6.0f} MiB"
                )
            print(f"round {number}  ratio {ratios[-1]:.2f}, by processor time {by_work[-1]:.2f}", flush=True)
        print(
            f"median ratio {statistics.median(ratios):.2f} (bar 1.30), by processor time "
            f"{statistics.median(by_work):.2f}"
        )
        peaks = [max(side) / 2**20 for side in zip(*memory, strict=True)]
        print(f"peak memory: mlx_lm_lora {peaks[0]:.0f} MiB, soupx {peaks[1]:.0f} MiB")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", required=True, help="the Python of an environment with mlx-lm-lora")
    parser.add_argument("--rows", type=int, default=64, help="pairs, a multiple of the batch size")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--longest", type=int, default=200, help="tokens of a prompt with its own answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--base", type=Path, help="a model folder; default: the demo's base")
    options = parser.parse_args()
    if options.rows % options.batch_size:
        parser.error("mlx-lm-lora drops an incomplete batch: rows must be a multiple of the batch size")
    return options


def _task(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    base, rows = options.base or prepare_base(), place / "rows.jsonl"
    made = pair_rows(base, options.rows, options.longest)
    rows.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    steps = options.rows // options.batch_size
    print(f"{options.rows} pairs, {steps} steps of {options.batch_size}, r {RANK} on all linear")
    return {
        "base": str(base),
        "rows": str(rows),
        "steps": steps,
        "batch_size": options.batch_size,
        # Far above: no row is cut.
        "max_length": 4 * options.longest,
        "rate": RATE,
        "rank": RANK,
        "alpha": ALPHA,
        "seed": SEED,
        "output": str(place),
    }


def _mlx_lm_lora(task: dict[str, Any], python: str, name: str) -> dict[str, float]:
    own = {**task, "output": str(Path(task["output"]) / name)}
    os.environ["PYTHONPATH"] = str(HERE.parent)
    child = run_child([python, str(HERE / "mlx_lm_lora_side.py"), json.dumps(own)])
    return {**json.loads(child.last_line), "memory": child.peak_bytes}


def _soupx(task: dict[str, Any], output: Path) -> dict[str, float]:
    config = output.with_suffix(".yaml")
    config.write_text(json.dumps(_config(task, output)), "utf-8")
    child = run_child([sys.executable, __file__, _OWN_SIDE, str(config)])
    return {**json.loads(child.last_line), "memory": child.peak_bytes}


def _config(task: dict[str, Any], output: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in Path(task["rows"]).read_text("utf-8").splitlines()]
    data = output.with_suffix(".jsonl")
    turns = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in rows
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in turns), "utf-8")
    return {
        "base": task["base"],
        "task": "dpo",
        "backend": "mlx",
        "data": {"train": str(data), "max_length": task["max_length"]},
        "training": {
            "max_steps": task["steps"], "lr": task["rate"], "batch_size": task["batch_size"],
            "scheduler": "constant", "warmup_ratio": 0.0, "weight_decay": 0.01, "precision": "fp32", "beta": 0.1,
            "seed": task["seed"], "lora": {"r": task["rank"], "alpha": task["alpha"]},
        },
        "output": str(output),
    }  # fmt: skip


def own_side(config: Path) -> None:
    """`soupx train` in this process, with the time of its reference and its loop. Prints one line of JSON."""
    from soup_xb.core.config.load import load_config
    from soup_xb.runs import train as story
    from soup_xb.runs.open import OpenRun
    from soup_xb.runs.resume import ResumeRequest, TrainOptions

    found = {"seconds": 0.0, "cpu_seconds": 0.0}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started, worked = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                found["seconds"] += time.perf_counter() - started
                found["cpu_seconds"] += time.process_time() - worked

        return call

    OpenRun.reference = timed(OpenRun.reference)  # type: ignore[method-assign]
    story.run_loop = timed(story.run_loop)
    outcome = story.train(load_config(config), TrainOptions(resume=ResumeRequest()), [])
    lines = (outcome.folder / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [event for event in map(json.loads, lines) if event["event"] == "step"]
    print(json.dumps({**found, "tokens": sum(event["tokens"] for event in steps), "steps": len(steps)}))


def _rate(side: dict[str, float], clock: str = "seconds") -> float:
    return side["tokens"] / side[clock]


if __name__ == "__main__":
    if sys.argv[1:2] == [_OWN_SIDE]:
        own_side(Path(sys.argv[2]))
    else:
        main()
