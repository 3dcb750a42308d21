"""Sampled tokens per second of a model in training, torch against MLX: a batch of answers, with a cache.

    python bench/sampling.py --answers 8 --tokens 64 --rounds 5

What grpo does before each step: every prompt is continued by the model with its adapter (rank 8 on all linear layers),
all in one batch, with tokens chosen by the same numbers. No answer ends early. Each backend has a process of its own,
which samples once to warm up; then they sample in turn. The bar: MLX has 0.8 of torch's tokens a second, by the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from rows import docstring_rows

from soup_xb.demo.base import prepare_base

BACKENDS = ("torch", "mlx")
_SIDE = "--side"


def main() -> None:
    """Sample in turn and print one line a round, then the figures."""
    options = _options()
    base = options.base or prepare_base()
    task = json.dumps({"base": str(base), "answers": options.answers, "tokens": options.tokens})
    sides = {name: _started(name, task) for name in BACKENDS}
    alike = {name: _asked(side)["tokens"] for name, side in sides.items()}
    rates: list[dict[str, float]] = []
    for number in range(1, options.rounds + 1):
        seconds = {name: _asked(side)["seconds"] for name, side in sides.items()}
        rates.append({name: options.answers * options.tokens / each for name, each in seconds.items()})
        told = ", ".join(f"{name} {rate:.1f} tokens/s" for name, rate in rates[-1].items())
        print(f"round {number}  {told}, ratio {rates[-1]['mlx'] / rates[-1]['torch']:.2f}", flush=True)
    for side in sides.values():
        side.communicate("\n")
    ratios = [round_["mlx"] / round_["torch"] for round_ in rates]
    medians = ", ".join(
        f"{name} {statistics.median(round_[name] for round_ in rates):.1f}" for name in BACKENDS
    )
    print(f"median tokens/s: {medians}; median ratio {statistics.median(ratios):.2f} (bar 0.80)")
    shared = [
        next((at for at, (one, other) in enumerate(zip(*rows, strict=True)) if one != other), options.tokens)
        for rows in zip(*alike.values(), strict=True)
    ]
    print(f"tokens of an answer until the first that differs: {shared}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--base", type=Path, help="a model folder; default: the demo's base")
    return parser.parse_args()


def _started(backend: str, task: str) -> subprocess.Popen[str]:
    words = [sys.executable, __file__, _SIDE, backend, task]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _asked(side: subprocess.Popen[str]) -> dict[str, Any]:
    """Let a side sample once."""
    assert side.stdin is not None
    assert side.stdout is not None
    side.stdin.write("sample\n")
    side.stdin.flush()
    answer: dict[str, Any] = json.loads(side.stdout.readline())
    return answer


def _side(backend: str, task: dict[str, Any]) -> None:
    """One process: samples for each line that it reads, until an empty one."""
    import numpy as np
    from tokenizers import Tokenizer

    from soup_xb.backends import open_session
    from soup_xb.core.base.modules import resolve_adapters
    from soup_xb.core.config.schema import Config, DataConfig, LoraConfig, TrainingConfig
    from soup_xb.core.run.session import GenerationSettings
    from soup_xb.runs.open import session_settings

    base, answers = Path(task["base"]), task["answers"]
    lora = LoraConfig(r=8, alpha=16)
    training = TrainingConfig(max_steps=1, precision="fp32", lora=lora)
    config = Config(base=str(base), data=DataConfig(train="none"), training=training)
    session = open_session(backend, session_settings(config, base))
    session.attach(_plan(resolve_adapters(session.describe().modules, lora, {}).adapters))
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    prompts = [
        np.array(tokenizer.encode(row["instruction"] + "\n" + row["input"]).ids, dtype=np.int32)
        for row in docstring_rows(answers)
    ]
    chances = np.random.default_rng(0).random((answers, task["tokens"]))
    # No token has the number that would end an answer.
    settings = GenerationSettings(task["tokens"], 1.0, end_ids=(2**31 - 1,))
    assert session.sampler is not None
    while sys.stdin.readline().strip():
        started = time.perf_counter()
        found = session.sampler.sample(prompts, chances, settings)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": [row.tolist() for row in found]}), flush=True)


def _plan(modules: Any) -> Any:
    from soup_xb.core.adapter.plan import AdapterPlan

    return AdapterPlan(modules=modules, dropout=0.0, init_strategy="random", use_rslora=False, seed=0)


if __name__ == "__main__":
    if sys.argv[1:2] == [_SIDE]:
        _side(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
