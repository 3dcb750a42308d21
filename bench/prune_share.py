"""How much of what an adapter adds one ReLoRA prune takes away, by start.

    python bench/prune_share.py --results quality

Each start is trained for a few steps on the rows of `quality.py`, without ReLoRA. Then the factors of its adapter are
pruned as a restart would prune them. The share is the norm of the change in B A (in B A - B0 A0 under pissa and olora)
over its norm before, mean over the modules.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from quality_rows import LONGEST, write_rows

from soup_xb.core.adapter.peft_file import read_adapter
from soup_xb.core.adapter.pieces import difference, prune
from soup_xb.core.adapter.starts import Start
from soup_xb.core.config.load import parse_config
from soup_xb.demo.base import prepare_base
from soup_xb.runs.resume import TrainOptions
from soup_xb.runs.train import train

# The best rates that quality.py found.
RATES = {"random": 1.8e-3, "pissa": 2e-4, "olora": 6.7e-5}
RANK = 16


def main() -> None:
    """Train each start and print its share."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("quality"), help="folder of the rows and runs")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.9)
    parser.add_argument("--base", type=Path, help="a model folder; default: the demo's base")
    options = parser.parse_args()
    base = options.base or prepare_base()
    options.results.mkdir(parents=True, exist_ok=True)
    write_rows(base, options.results, 32)
    for strategy, rate in RATES.items():
        shares = pruned_shares(adapter(options, base, strategy, rate), strategy, options.ratio)
        print(
            f"{strategy}: {np.mean(shares):.0%} of B A changes, {min(shares):.0%} to {max(shares):.0%} by module",
            flush=True,
        )


def adapter(options: argparse.Namespace, base: Path, strategy: str, rate: float) -> Path:
    """A short run's adapter."""
    content = {
        "base": str(base),
        "backend": "torch",
        "data": {
            "train": str(options.results / "train.jsonl"),
            "format": "prompt-completion",
            "max_length": LONGEST,
        },
        "training": {
            "max_steps": options.steps,
            "lr": rate,
            "scheduler": "constant",
            "precision": "fp32",
            "seed": 0,
            "lora": {"r": RANK, "alpha": 2 * RANK, "init_strategy": strategy},
        },
        "output": str(options.results / f"prune-share-{strategy}"),
    }
    return train(parse_config(json.dumps(content), strategy), TrainOptions(overwrite=True), []).adapter


def pruned_shares(folder: Path, strategy: str, ratio: float) -> list[float]:
    """Each module's share."""
    shares = []
    for arrays in read_adapter(folder).factors.values():
        a, b, start = arrays["lora_A"], arrays["lora_B"], None
        if strategy != "random":
            # The saved form is (B - B0) A + B0 (A - A0).
            start = Start(a[:RANK] - a[RANK:], b[:, RANK:])
            a, b = a[:RANK], b[:, :RANK] + start.b
        pruned_a, pruned_b = prune(a, ratio, start and start.a)[0], prune(b, ratio, start and start.b)[0]
        before, after = difference(a, b, start), difference(pruned_a, pruned_b, start)
        added = before.b @ before.a
        shares.append(float(np.linalg.norm(after.b @ after.a - added) / np.linalg.norm(added)))
    return shares


if __name__ == "__main__":
    main()
