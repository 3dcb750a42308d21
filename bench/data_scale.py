"""Whether memory stays flat and a second start is quick when the data grows: 10,000 rows against 1,000,000.

    python bench/data_scale.py --rows 1000000

Short rows of text with a prompt are made here, no two alike, and tokenized with the demo's real tokenizer. For each
size, each in a process of its own: a first start, which opens the tokenizer, tokenizes the rows, keeps them, and plans
a run (order and batches of the first and the last epoch, the steps' targets); a second start, the same from what was
kept; and `soupx plan`. Peak memory is the largest resident size of the process; of the processes that tokenize beside
it, the largest is told. The rate a core is rows over the processor time of all processes together. The bars: at most
1.3x the memory of the small data, and below 10 s for a second start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from child import Child, run_child

from soup_xb.demo.base import prepare_base

_PLACES = ("the river", "an old mill", "the harbour", "a garden", "the north tower", "a quiet street")
_THINGS = ("a silver coin", "two letters", "an engine", "a basket of plums", "the last candle", "a marble")


def write_rows(file: Path, count: int) -> None:
    """Rows of about 45 tokens, a function of their number."""
    chance = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            first, second = chance.randrange(1000), chance.randrange(1000)
            place, thing = chance.choice(_PLACES), chance.choice(_THINGS)
            prompt = f"{number}: what lies at {place}, and what is {first} plus {second}?"
            answer = f" At {place} lies {thing}; {first} plus {second} is {first + second}."
            lines.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")


def main() -> None:
    """Measure both sizes and print the figures."""
    options = _options()
    if options.measure is not None:
        _measure(options.measure)
        return
    base = prepare_base()
    with tempfile.TemporaryDirectory(prefix="data-scale-", dir=options.folder) as folder:
        sizes = (options.small, options.rows)
        small, large = (_both_starts(Path(folder) / str(rows), rows, base) for rows in sizes)
    for name, what in (("first", "first start"), ("second", "second start"), ("plan", "soupx plan")):
        ratio = large[name]["peak"] / small[name]["peak"]
        print(
            f"{what}: {small[name]['peak'] / 2**20:,.0f} MiB at {options.small:,} rows, "
            f"{large[name]['peak'] / 2**20:,.0f} MiB at {options.rows:,}: {ratio:.2f}x (bar: at most 1.3x); "
            f"{large[name]['seconds']:.1f} s"
        )
    told = large["first"]
    print(
        f"tokenizing: {told['rows']:,} rows, {told['tokens']:,} tokens in {told['opening']:.0f} s by "
        f"{told['processes']} processes; a core does {told['rows'] / told['processor']:,.0f} rows a second "
        f"({told['tokens'] / told['processor']:,.0f} tokens); the largest helper has {told['helper'] / 2**20:,.0f} MiB"
    )
    print(f"second start: {large['second']['seconds']:.1f} s from nothing to a plan (bar: below 10 s)")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where rows and what is kept of them lie meanwhile")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _both_starts(place: Path, rows: int, base: Path) -> dict[str, dict[str, Any]]:
    place.mkdir()
    write_rows(place / "rows.jsonl", rows)
    config = {
        "base": str(base), "backend": "torch", "output": str(place / "out"),
        "data": {"train": str(place / "rows.jsonl")}, "training": {"epochs": 3, "batch_size": 8},
    }  # fmt: skip
    file = place / "soup.yaml"
    file.write_text(json.dumps(config, indent=1), "utf-8")
    # Nothing of an earlier measurement, and nothing left behind.
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    measuring = [sys.executable, __file__, "--measure", str(file)]
    first, second = (run_child(measuring) for _ in range(2))
    planned = run_child([sys.executable, "-m", "soup_xb", "plan", str(file)])
    if json.loads(first.last_line)["order"] != json.loads(second.last_line)["order"]:
        sys.exit("the second start plans another order")
    plan = {"peak": planned.peak_bytes, "seconds": planned.seconds}
    found = {"first": _told(first), "second": _told(second), "plan": plan}
    shown = {name: {key: side[key] for key in side if key != "order"} for name, side in found.items()}
    print(f"{rows:,} rows: {json.dumps(shown)}", file=sys.stderr, flush=True)
    return found


def _told(child: Child) -> dict[str, Any]:
    return {**json.loads(child.last_line), "peak": child.peak_bytes, "seconds": child.seconds}


def _measure(file: Path) -> None:
    """One start: the data opened and a run planned, told as one line of JSON."""

    from soup_xb.core.base.modules import Resolution
    from soup_xb.core.config.load import load_config
    from soup_xb.core.process import tokenizing_processes
    from soup_xb.core.rows.table import combined
    from soup_xb.core.run.plan import make_plan
    from soup_xb.data.dataset import load_dataset
    from soup_xb.data.tokenizer import open_tokenizer

    config = load_config(file).config
    tokenizer = open_tokenizer(Path(config.base))
    started = time.perf_counter()
    dataset = load_dataset(config.data, tokenizer, config.training.seed)
    opening = time.perf_counter() - started
    plan = make_plan(config, Resolution((), ()), dataset.train, dataset.evaluation, tokenizer.pad_id)
    steps = (1, plan.steps_per_epoch, plan.total_steps)
    order = [[rows.tolist() for rows in plan.step_rows(step)] for step in steps]
    targets = [plan.target_tokens(step) for step in steps]
    for step in steps:
        plan.micro_batches(step)
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    unit = 1 if sys.platform == "darwin" else 1024
    told = {
        "rows": len(plan.rows), "tokens": int(plan.rows.facts.tokens.sum()), "opening": opening,
        "order": [order, targets, combined(plan.rows.fingerprint)], "helper": children.ru_maxrss * unit,
        "processes": tokenizing_processes(Path(config.data.train[0]).stat().st_size),
        "processor": sum(part.ru_utime + part.ru_stime for part in (own, children)),
    }  # fmt: skip
    print(json.dumps(told))


if __name__ == "__main__":
    main()
