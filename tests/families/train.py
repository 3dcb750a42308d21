"""Trains a type's tiny model on both backends, and compares: losses, adapters, and what each makes of the other's.

    python tests/families/train.py qwen3_moe gpt_oss

Of each type: 20 steps of sft with accumulation and ranks by pattern, and of dpo, from random, pissa and olora starts.
A loss may be off by 1e-4, or by four times what one unit in the last place of every weight makes of torch's own run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import numpy as np  # noqa: E402
from attrs import evolve  # noqa: E402

STEPS = 20
FIRST, LATER, DRIFTS = 2e-5, 1e-4, 4.0
WAYS: dict[str, dict[str, Any]] = {
    "sft": {"gradient_accumulation_steps": 2},
    "sft pissa": {"init_strategy": "pissa", "max_steps": 6},
    "sft olora": {"init_strategy": "olora", "max_steps": 6},
    "dpo": {"max_steps": 10},
}


def rows(task: str, count: int) -> Any:
    from tiny import TOKENS

    from soup_xb.core.rows.examples import Source
    from soup_xb.core.rows.judged import learned_rows
    from soup_xb.core.rows.row import Row, TokenSequence, text_row
    from soup_xb.core.tasks import TASKS

    rng = np.random.default_rng(count)
    source = Source("rows.jsonl", 1)
    if task == "sft":
        lengths = [int(rng.integers(8, 60)) for _ in range(count)]
        return tuple(
            text_row(rng.integers(3, TOKENS, size), np.arange(size) >= size // 3, source) for size in lengths
        )

    def answer(prompt: Any, low: int) -> TokenSequence:
        tokens = np.concatenate([prompt, rng.integers(low, low + 6, int(rng.integers(3, 20)))])
        return TokenSequence(tokens, np.arange(tokens.size) >= prompt.size, source)

    prompts = [rng.integers(3, TOKENS, int(rng.integers(4, 25))) for _ in range(count)]
    pairs = tuple(Row("pair", (answer(prompt, 10), answer(prompt, 80))) for prompt in prompts)
    return learned_rows(pairs, TASKS[task].kind, 64, TASKS[task].needs_mismatched)


def opened(backend: str, base: Path, way: str, **changes: Any) -> tuple[Any, Any]:
    """A session with its adapter on, and the plan."""
    from soup_xb.backends import open_session
    from soup_xb.core.base.modules import resolve_adapters
    from soup_xb.core.config.schema import Config, DataConfig, LoraConfig, TrainingConfig
    from soup_xb.core.objectives.objective import row_log_probabilities
    from soup_xb.core.rows.batches import sequence_batches
    from soup_xb.core.run.plan import make_plan
    from soup_xb.core.run.reference import Reference
    from soup_xb.core.tasks import TASKS
    from soup_xb.runs.open import session_settings

    told = {**WAYS[way], **changes}
    start, task = told.pop("init_strategy", "random"), way.partition(" ")[0]
    data = DataConfig(train=("rows.jsonl",))
    # What both have: experts that MLX cannot adapt are refused there.
    first = open_session("mlx", session_settings(Config(base=str(base), data=data), base, weights=False))
    modules = first.describe().modules
    first.close()
    experts = any(module.experts for module in modules)
    lora = LoraConfig(
        r=4,
        alpha=8,
        init_strategy=start,
        target_modules="auto+experts" if experts else "auto",
        rank_pattern={_last(modules): 2},
    )
    settings = TrainingConfig(
        **{
            "max_steps": STEPS,
            "lr": 2e-3,
            "adam_epsilon": 1e-4,
            "seed": 3,
            "batch_size": 3,
            "lora": lora,
            **told,
        }
    )
    config = Config(base=str(base), task=task, data=data, training=settings)
    session = open_session(backend, session_settings(config, base))
    resolution = resolve_adapters(session.describe().modules, lora, {})
    train = rows(task, 12)
    plan = make_plan(config, resolution, train, (), pad_id=0)
    session.attach(plan.adapters)
    if TASKS[task].needs_reference:
        known = np.zeros((len(train), len(train[0].sequences)))
        for places, batch in sequence_batches(train, 4, 0, 0, 1):
            known.reshape(-1)[places] = row_log_probabilities(session.scorer, batch)
        plan = evolve(plan, reference=Reference(known, np.zeros((0, known.shape[1]))))
    return session, plan


def _last(modules: Any) -> str:
    """A pattern that some modules of `auto` have in common."""
    from soup_xb.core.base.modules import is_decoder_linear

    names = [module.name for module in modules if is_decoder_linear(module.name) and not module.experts]
    return max(name.rpartition(".")[2] for name in names)


def losses(session: Any, plan: Any) -> list[float]:
    from soup_xb.core.run.session import StepSettings

    return [
        session.train_step(
            plan.micro_batches(step),
            StepSettings(step, plan.learning_rates.at(step), plan.target_tokens(step), plan.examples(step)),
        ).loss
        for step in range(1, plan.total_steps + 1)
    ]


def compare(name: str, work: Path, ways: Any = WAYS, **changes: Any) -> dict[str, Any]:
    """What is off, by way; `equal` where nothing is."""
    from prove import nudged
    from tiny import tiny_base

    folder, result = tiny_base(name, work / "base"), {}
    for way in ways:
        (theirs, plan), (ours, mine) = (
            opened("torch", folder, way, **changes),
            opened("mlx", folder, way, **changes),
        )
        names = {module.name for module in plan.adapters.modules}
        if names != {module.name for module in mine.adapters.modules}:
            odd = names ^ {module.name for module in mine.adapters.modules}
            return {**result, way: {"equal": False, "modules": sorted(odd)[:6]}}
        first, second = losses(theirs, plan), losses(ours, mine)
        off = np.abs(np.array(first) - np.array(second))
        told: dict[str, Any] = {"first": float(off[0]), "worst": float(off.max()), "loss": first[-1]}
        if off.max() > LATER:
            shaken, again = opened("torch", folder, way, **changes)
            nudged(shaken.model)
            told["drift"] = float(np.abs(np.array(losses(shaken, again)) - np.array(first)).max())
        told["equal"] = off[0] <= FIRST and off.max() <= max(LATER, DRIFTS * told.get("drift", 0.0))
        if way == "sft":
            told |= exchanged(theirs, ours)
            told["equal"] = told["equal"] and told["adapter"] <= 2e-5
        told["equal"] = bool(told["equal"])
        result[way] = told
        theirs.close()
        ours.close()
    return result


def exchanged(theirs: Any, ours: Any) -> dict[str, float]:
    """What torch makes of the adapter that MLX trained, relative to the largest logit; and that it moves something."""
    from prove import tokens

    ids = tokens(40)
    ours_logits = ours.logits(ids)
    theirs.load_factors(ours.factors())
    again = theirs.logits(ids)
    scale = float(np.abs(again).max())
    moved = float(np.abs(again - theirs.logits(ids, adapter=False)).max()) / scale
    return {"adapter": float(np.abs(ours_logits - again).max()) / scale, "moved": moved}


def main() -> None:
    """The command line."""
    from prove import quiet

    quiet()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="all proven ones by default")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "train-families")
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    options = parser.parse_args()
    import torch
    from tiny import CASES

    from soup_xb.core.base.proven import proven_types

    torch.set_num_threads(1)
    options.results.mkdir(parents=True, exist_ok=True)
    wrong = []
    # The whole type of a nested case opens with packages that only its towers need.
    for name in options.types or [name for name in proven_types() if not CASES[name].get("nested")]:
        started = time.time()
        with tempfile.TemporaryDirectory() as work:
            try:
                told = compare(name, Path(work), options.ways)
            except Exception as error:  # noqa: BLE001 - any failure is the verdict
                import traceback

                told = {
                    "error": {
                        "equal": False,
                        "message": f"{type(error).__name__}: {error}"[:300],
                        "trace": traceback.format_exc()[-1500:],
                    }
                }
        (options.results / f"{name}.json").write_text(json.dumps(told, indent=1), "utf-8")
        odd = {way: each for way, each in told.items() if not each["equal"]}
        wrong += [name] if odd else []
        shown = (
            "equal"
            if not odd
            else json.dumps({k: {a: b for a, b in v.items() if a != "trace"} for k, v in odd.items()})
        )
        worst = max((each.get("worst", 0.0) for each in told.values()), default=0.0)
        print(f"{name:18} {shown[:400]}  {worst:.1e}  {time.time() - started:.0f} s", flush=True)
    sys.exit(f"{len(wrong)} types differ: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
