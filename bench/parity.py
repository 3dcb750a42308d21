"""The same losses on torch and on MLX: the first steps of preference tasks on a real model, by `soupx parity`.

    python bench/parity.py --tasks dpo kto orpo --steps 20

The pairs are short docstrings of Python's standard library (`rows.py`): a function's own as the chosen answer, that of
another one as the rejected. Both backends read one file, each in a process of its own. The bars: losses and means
within 1e-3 at every step, and the same reward accuracy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from rows import pair_rows

from soup_xb.demo.base import prepare_base


def main() -> None:
    """Compare the backends task by task, print a line each, and fail where they differ."""
    options = _options()
    base = options.base or prepare_base()
    differ = []
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        data = Path(folder, "pairs.jsonl")
        made = pair_rows(base, options.steps * options.batch_size, options.longest)
        data.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
        for task in options.tasks:
            found = _parity(_config(base, data, task, options), options.steps)
            means = found["means_differences"]
            print(
                f"{task}: {options.steps} steps, losses at most {found['loss_difference']:.1e} apart (bar: 1e-3), "
                f"{', '.join(f'{name} {value:.1e}' for name, value in means.items())}; "
                f"loss {found['losses']['torch'][0]:.4f} at first, {found['losses']['torch'][-1]:.4f} at last",
                flush=True,
            )
            if not found["same"] or means.get("reward_accuracy") != 0:
                differ.append(task)
    if differ:
        sys.exit(f"the backends differ: {', '.join(differ)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["dpo", "kto", "orpo"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2, help="pairs, or judged answers, of a step")
    parser.add_argument("--longest", type=int, default=64, help="tokens of a prompt with its own answer")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--base", type=Path, help="a model folder; default: the demo's base")
    return parser.parse_args()


def _config(base: Path, data: Path, task: str, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "base": str(base),
        "task": task,
        "data": {"train": str(data), "max_length": 2 * options.longest},
        "training": {
            "max_steps": options.steps, "lr": options.lr, "batch_size": options.batch_size, "precision": "fp32",
            "seed": 0, "lora": {"r": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        },
        "output": str(data.with_name(task)),
    }  # fmt: skip


def _parity(config: dict[str, Any], steps: int) -> dict[str, Any]:
    file = Path(config["output"]).with_suffix(".yaml")
    file.write_text(json.dumps(config, indent=1), "utf-8")
    words = ["parity", str(file), "--steps", str(steps), "--json"]
    # It exits with 4 where the backends differ, and tells the figures all the same.
    done = subprocess.run([sys.executable, "-m", "soup_xb", *words], stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 4) or not done.stdout:
        sys.exit(f"soupx parity failed with {config['task']}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


if __name__ == "__main__":
    main()
