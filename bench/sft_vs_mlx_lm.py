"""Tokens per second of `soupx train --backend mlx` and of `mlx_lm.lora`, doing the same work with the same BLAS.

    python bench/sft_vs_mlx_lm.py --rows 64 --rounds 2

Rows, steps, adapter (all linear layers of all blocks), prompt mask and precision are the same; neither side
evaluates. Each side runs in its own process, in turn. The time is the whole training loop's, compilation
included, tokens are real ones (no padding), memory is the process's largest resident size. On Linux the wheel of
mlx brings a slow BLAS along; `--own-blas` adds a round of `mlx_lm.lora` with it. The bars: a median ratio of 1.3
with the same BLAS, 10 against the wheel's own.
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
from sft_vs_trainer import ALPHA, RANK, RATE, SEED, fitting_rows, soupx_side

from soup_xb.demo.base import prepare_base

HERE = Path(__file__).parent


def main() -> None:
    """Run the rounds and print one line for each side, then the figures."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="sft-vs-mlx-lm-") as place:
        task = _task(options, Path(place))
        ratios, memory = [], []
        for number in range(1, options.rounds + 1):
            theirs = _mlx_lm(task, f"mlx-lm-{number}", fast_blas=True)
            ours = soupx_side(task, Path(place) / f"soupx-{number}", "mlx")
            ratios.append(theirs["seconds"] / ours["seconds"])
            memory.append((theirs["memory"], ours["memory"]))
            for name, side in (("mlx_lm", theirs), ("soupx", ours)):
                _print_side(f"round {number}  {name}", side, task["tokens"])
            print(f"round {number}  ratio {ratios[-1]:.2f}", flush=True)
        print(f"median ratio {statistics.median(ratios):.2f} (bar 1.30, aim 2)")
        peaks = [max(side) / 2**20 for side in zip(*memory, strict=True)]
        print(f"peak memory: mlx_lm {peaks[0]:.0f} MiB, soupx {peaks[1]:.0f} MiB")
        if options.own_blas:
            # The slow side alone is cut short: a few steps tell its speed.
            few = {**task, "steps": options.own_blas}
            slow = _mlx_lm(few, "mlx-lm-own", fast_blas=False)
            per_step = slow["seconds"] / options.own_blas * task["steps"] / ours["seconds"]
            print(f"mlx_lm with the wheel's own BLAS: {slow['seconds'] / options.own_blas:.1f} s a step")
            print(f"ratio against it {per_step:.1f} (bar 10)")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=64, help="training rows, a multiple of the batch size")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--own-blas", type=int, default=0, metavar="STEPS", help="also time the wheel's own BLAS"
    )
    parser.add_argument("--base", type=Path, help="a model folder; default: the demo's base")
    options = parser.parse_args()
    if options.rows % options.batch_size:
        parser.error("mlx_lm drops an incomplete batch: rows must be a multiple of the batch size")
    return options


def _task(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    from tokenizers import Tokenizer

    base = options.base or prepare_base()
    rows = fitting_rows(base, options.rows, options.max_length)
    file = place / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokens = sum(len(tokenizer.encode("\n\n".join(row.values())).ids) + 40 for row in rows)
    steps = options.rows // options.batch_size
    print(
        f"{options.rows} rows, {steps} steps of {options.batch_size}, about {tokens} tokens, r {RANK} on all linear"
    )
    return {
        "base": str(base),
        "rows": str(file),
        "steps": steps,
        "tokens": tokens,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "targets": "all-linear",
        "rate": RATE,
        "rank": RANK,
        "alpha": ALPHA,
        "seed": SEED,
        "output": str(place),
    }


def _mlx_lm(task: dict[str, Any], name: str, fast_blas: bool) -> dict[str, float]:
    own = {**task, "output": str(Path(task["output"]) / name), "fast_blas": fast_blas}
    child = run_child([sys.executable, str(HERE / "mlx_lm_side.py"), json.dumps(own)])
    return {**json.loads(child.last_line), "memory": child.peak_bytes, "process_seconds": child.seconds}


def _print_side(name: str, side: dict[str, float], tokens: int) -> None:
    print(
        f"{name:16} {tokens / side['seconds']:8.1f} tokens/s  loop {side['seconds']:6.1f} s  "
        f"process {side['process_seconds']:6.1f} s  {side['memory'] / 2**20:6.0f} MiB"
    )


if __name__ == "__main__":
    main()
