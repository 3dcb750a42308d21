"""What group-relative policy optimisation teaches: a format that the model keeps to in few of its answers at first.

    python bench/grpo.py --steps 11 --svg docs/images/grpo.svg

The prompts are short questions behind one example of the form that is asked for, `<answer>…</answer>`. The reward is
the built-in `format`: 1 where the answer stands between one pair of tags, else 0. Six questions are held out. The
first step's answers are those of the untouched model. The bar: from below 0.3 to above 0.8.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from soup_xb.demo.base import prepare_base

_FACTS = {
    "Capital of {}?": {
        "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Norway": "Oslo",
        "Greece": "Athens", "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "Ireland": "Dublin",
    },
    "Opposite of {}?": {
        "big": "small", "old": "young", "dark": "light", "wet": "dry", "fast": "slow", "high": "low", "full": "empty",
        "hard": "soft", "rich": "poor", "loud": "quiet", "early": "late",
    },
    "Colour of {}?": {
        "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow", "blood": "red", "the sky": "blue",
        "a carrot": "orange", "milk": "white", "a leaf": "green", "a banana": "yellow", "salt": "white",
    },
}  # fmt: skip
_EXAMPLE = "Opposite of hot? <answer>cold</answer>\n"
_HELD_OUT = 6


def rows() -> list[dict[str, Any]]:
    """Every question once behind the example, kinds in turn: the first ones are held out."""
    kinds = [
        [(kind.format(thing), answer) for thing, answer in facts.items()] for kind, facts in _FACTS.items()
    ]
    return [
        {"prompt": _EXAMPLE + question, "answer": answer}
        for question, answer in (pair for pairs in zip(*kinds, strict=True) for pair in pairs)
    ]


def main() -> None:
    """Train, print the figures, and draw the curve."""
    options = _options()
    if options.metrics is None:
        with tempfile.TemporaryDirectory(prefix="grpo-") as folder:
            lines = _trained(Path(folder), options)
    else:
        lines = options.metrics.read_text("utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    steps = [event for event in events if event["event"] == "step"]
    evals = [event for event in events if event["event"] == "eval"]
    first, last = _reward(steps[:1]), _reward(steps[-5:])
    for event in evals:
        print(f"step {event['step']}: held-out reward {event['means']['reward']:.2f}")
    seconds = sum(event["seconds"] for event in steps)
    print(f"{len(steps)} steps, {seconds:,.0f} s, {seconds / len(steps):.1f} s a step")
    print(
        f"reward: {first:.2f} at step 1 (bar: below 0.3), {last:.2f} in the last five steps (bar: above 0.8)"
    )
    tokens = [event["means"]["completion_tokens"] for event in (steps[0], steps[-1])]
    print(f"tokens of an answer: {tokens[0]:.1f} at step 1, {tokens[1]:.1f} at the end")
    if options.svg is not None:
        options.svg.write_text(curve(steps, evals), "utf-8")


def curve(steps: list[dict[str, Any]], evals: list[dict[str, Any]]) -> str:
    """The rewards of the steps and of the held-out prompts as a small SVG."""
    width, height, left, bottom = 640, 240, 44, 30
    last = max(event["step"] for event in steps)

    def place(event: dict[str, Any]) -> tuple[float, float]:
        across = left + (event["step"] - 1) / max(1, last - 1) * (width - left - 12)
        return round(across, 1), round(height - bottom - event["means"]["reward"] * (height - bottom - 14), 1)

    lines = []
    for level in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        y = round(height - bottom - level * (height - bottom - 14), 1)
        lines.append(f'<path d="M{left} {y}H{width - 12}" stroke="#8884"/>')
        lines.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{level:g}</text>')
    path = " ".join(f"{x},{y}" for x, y in map(place, steps))
    lines.append(f'<polyline points="{path}" fill="none" stroke="#3b82c4" stroke-width="1.8"/>')
    lines += [f'<circle cx="{x}" cy="{y}" r="4" fill="#d97706"/>' for x, y in map(place, evals)]
    legend = "reward by step (line) and on held-out prompts (dots)"
    lines.append(f'<text x="{left}" y="{height - 8}">{legend}, {last} steps</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
    return f'{head} font-size="12" fill="#777">\n' + "\n".join(lines) + "\n</svg>\n"


def _reward(steps: list[dict[str, Any]]) -> float:
    return float(sum(event["means"]["reward"] for event in steps) / len(steps))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--batch-size", type=int, default=2, help="prompts of one step, each answered 8 times"
    )
    parser.add_argument("--backend", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--base", type=Path, help="a model folder; default: the demo's base")
    parser.add_argument("--svg", type=Path, help="where the curve goes")
    parser.add_argument("--output", type=Path, help="keep rows and run in this folder; a second call goes on")
    parser.add_argument("--metrics", type=Path, help="tell about a run that is done, by its metrics.jsonl")
    return parser.parse_args()


def _trained(place: Path, options: argparse.Namespace) -> list[str]:
    """One `soupx train` in a process of its own; its events."""
    place = options.output or place
    place.mkdir(parents=True, exist_ok=True)
    output = place / "out"
    made = rows()
    files = {"held-out": made[:_HELD_OUT], "train": made[_HELD_OUT:]}
    for name, part in files.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    config = {
        "base": str(options.base or prepare_base()),
        "task": "grpo",
        "backend": options.backend,
        "data": {"train": str(place / "train.jsonl"), "eval": str(place / "held-out.jsonl"), "max_length": 256},
        "training": {
            "rewards": ["format"], "group_size": 8, "max_new_tokens": 16, "beta": 0, "max_steps": options.steps,
            "lr": options.lr, "scheduler": "constant", "batch_size": options.batch_size, "eval_steps": 10,
            "save_steps": 5, "save_total_limit": 1, "logging_steps": 1, "seed": 0,
            "lora": {"r": 8, "alpha": 16},
        },
        "output": str(output),
    }  # fmt: skip
    file = place / "soup.yaml"
    file.write_text(json.dumps(config, indent=1), "utf-8")
    command = [sys.executable, "-m", "soup_xb", "train", str(file), "--resume"]
    subprocess.run(command, check=True, env=os.environ)
    return (output / "metrics.jsonl").read_text("utf-8").splitlines()


if __name__ == "__main__":
    main()
