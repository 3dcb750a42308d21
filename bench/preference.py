"""What DPO costs and what it teaches: peak memory against SFT on the same tokens, and accuracy on held-out pairs.

    python bench/preference.py --rows 200 --steps 100

The pairs are made here: a short question about two numbers or a word, answered in one plain line (chosen) or with
a preamble and the same answer (rejected). A fifth is held out. SFT learns both answers of the same prompts as rows
of their own, twice as many to a micro-batch: the same tokens, the same shape. Each side runs in its own process;
memory is its largest resident size. The bars: 1.25x the memory of SFT, held-out accuracy above 0.8.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from child import run_child

from soup_xb.demo.base import prepare_base

_WORDS = ("river", "candle", "window", "marble", "engine", "garden", "letter", "silver", "planet", "basket")
_PREAMBLES = (
    "What a wonderful question! Let me think about it step by step. ",
    "Thank you so much for asking. I would be delighted to help you with that. ",
    "As a language model I can try to answer this, although opinions differ. ",
    "There are many ways to look at it, and each of them has its merits. ",
)


def pairs(count: int) -> list[tuple[str, str, str]]:
    """Question, plain answer, and the answer behind a preamble; every question once, in an order without meaning."""
    sums = [(f"What is {a} plus {b}?", f"{a + b}.") for a in range(2, 32) for b in range(3, 11)]
    letters = [(f"How many letters has `{word}`?", f"{len(word)}.") for word in _WORDS]
    first = [(f"What is the first letter of `{word}`?", f"{word[0].upper()}.") for word in _WORDS]
    order = random.Random(0)
    questions = [*sums, *letters, *first]
    order.shuffle(questions)
    if count > len(questions):
        sys.exit(f"there are {len(questions)} questions, not {count}")
    return [(question, answer, order.choice(_PREAMBLES) + answer) for question, answer in questions[:count]]


def main() -> None:
    """Run both sides and print one line each, then the two figures."""
    options = _options()
    base = options.base or prepare_base()
    with tempfile.TemporaryDirectory(prefix="preference-") as folder:
        place = Path(folder)
        made = pairs(options.rows)
        dpo = _run(place / "dpo", _preference_rows(made), _config(base, "dpo", options))
        sft = _run(place / "sft", _answer_rows(made), _config(base, "sft", options))
    accuracy = dpo["eval"]["means"]["reward_accuracy"]
    for name, side in (("dpo", dpo), ("sft", sft)):
        print(
            f"{name}: {side['steps']} steps, {side['tokens']:,} tokens, {side['seconds']:.0f} s, "
            f"peak {side['peak'] / 2**20:,.0f} MiB"
        )
    print(f"memory of dpo against sft: {dpo['peak'] / sft['peak']:.2f}x (bar: at most 1.25x)")
    print(
        f"held-out reward accuracy: {accuracy:.2f} (bar: above 0.8), margin {dpo['eval']['means']['reward_margin']:.2f}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200, help="pairs, of which a fifth is held out")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4, help="pairs of one micro-batch")
    parser.add_argument("--base", type=Path, help="a model folder; default: the demo's base")
    return parser.parse_args()


def _config(base: Path, task: str, options: argparse.Namespace) -> dict[str, Any]:
    sequences = options.batch_size * {"dpo": 1}.get(task, 2)
    lora = {"r": 8, "alpha": 16}
    return {
        "base": str(base),
        "task": task,
        "backend": "torch",
        "data": {"val_split": 0.2, "max_length": 256},
        "training": {
            "max_steps": options.steps, "lr": 1e-4, "batch_size": sequences, "warmup_ratio": 0.1,
            "seed": 0, "lora": lora,
        },
    }  # fmt: skip


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _preference_rows(made: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    return [
        {"chosen": _turns(question, chosen), "rejected": _turns(question, rejected)}
        for question, chosen, rejected in made
    ]


def _answer_rows(made: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    return [{"messages": _turns(question, answer)} for question, *answers in made for answer in answers]


def _run(place: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """One `soupx train` in a process of its own."""
    place.mkdir()
    data, file, output = place / "rows.jsonl", place / "soup.yaml", place / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config["data"]["train"], config["output"] = str(data), str(output)
    file.write_text(json.dumps(config, indent=1), "utf-8")
    child = run_child([sys.executable, "-m", "soup_xb", "train", str(file)])
    record = json.loads((output / "run.json").read_text("utf-8"))
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return {
        "steps": record["steps"],
        "tokens": sum(event["tokens"] for event in events if event["event"] == "step"),
        "seconds": record["train_seconds"],
        "peak": child.peak_bytes,
        "eval": [event for event in events if event["event"] == "eval"][-1],
    }


if __name__ == "__main__":
    main()
