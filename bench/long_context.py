"""Tokens of a row against peak memory and time of a training step: `python bench/long_context.py`.

A Llama of two blocks with random weights, one head, hidden size 32 and a vocabulary of 8,192, LoRA rank 8 on all linear
layers, float32, every token trained on. Each figure is the largest resident set of a process of its own that opens
the base and does one step on one row, less that of one that does it on 16 tokens. Small layers leave the
logits and the attention as what memory is spent on; a larger model adds its activations, which grow with the tokens too
and which gradient checkpointing keeps small.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from child import run_child

LENGTHS = (2048, 4096, 8192, 16384, 32768)
VOCABULARY = 8_192
# What is on in each column: chunks of the head, gradient checkpointing, documents of 1,024 tokens in the row.
COLUMNS = {
    "all logits at once": (False, False, False),
    "chunked head": (True, False, False),
    "and checkpointing": (True, True, False),
    "packed": (True, True, True),
}
_NOTHING_LONG = 16
_MIB = 2**20


def save_base(folder: Path) -> None:
    """The tiny base."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=max(LENGTHS),
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def step(base: Path, backend: str, length: int, column: str) -> None:
    """One step on one row; prints its seconds and its loss."""
    import numpy as np

    from soup_xb.backends import open_session
    from soup_xb.core.base.modules import resolve_adapters
    from soup_xb.core.config.schema import Config, DataConfig, LoraConfig, TrainingConfig
    from soup_xb.core.objectives import head_chunks
    from soup_xb.core.rows.batches import collate
    from soup_xb.core.rows.examples import Source
    from soup_xb.core.rows.packing import pack
    from soup_xb.core.rows.row import text_row
    from soup_xb.core.run.plan import make_plan
    from soup_xb.core.run.session import StepSettings
    from soup_xb.runs.open import session_settings

    chunked, checkpointing, packed = COLUMNS[column]
    if not chunked:
        head_chunks.MOST_AT_ONCE = 2**60
    training = TrainingConfig(
        precision="fp32", gradient_checkpointing=checkpointing, lora=LoraConfig(r=8), max_steps=1
    )
    config = Config(base=str(base), data=DataConfig(train=("rows.jsonl",)), training=training)
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, length)
    sizes = [min(1024, length)] * max(1, length // 1024) if packed else [length]
    rows = [
        text_row(tokens[:size], np.arange(size) > 0, Source("rows.jsonl", at))
        for at, size in enumerate(sizes)
    ]
    row = pack(rows, length)
    session: Any = open_session(backend, session_settings(config, base))
    plan = make_plan(config, resolve_adapters(session.describe().modules, training.lora, {}), row, (), 0)
    session.attach(plan.adapters)
    batch = collate([one.sequences[0] for one in row], 0)
    started = time.perf_counter()
    result = session.train_step([batch], StepSettings(1, 1e-3, batch.target_tokens, 1))
    print(json.dumps({"seconds": time.perf_counter() - started, "loss": result.loss}))


def main() -> None:
    """Every length in every column, shortest first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        base, length, column = options.step
        step(Path(base), options.backend, int(length), column)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder))
        print("| tokens | " + " | ".join(options.columns) + " |")
        print("|---:|" + "---:|" * len(options.columns))
        short, _ = _run(folder, options.backend, _NOTHING_LONG, options.columns[0])
        for length in (one for one in LENGTHS if one <= options.longest):
            cells = []
            for column in options.columns:
                peak, seconds = _run(folder, options.backend, length, column)
                cells.append(f"{(peak - short) / _MIB:,.0f} MiB, {seconds:.1f} s")
            print(f"| {length:,} | " + " | ".join(cells) + " |", flush=True)


def _run(folder: str, backend: str, length: int, column: str) -> tuple[int, float]:
    """Peak memory in bytes of a process of its own, and the seconds of its step."""
    command = [sys.executable, __file__, "--backend", backend, "--step", folder]
    done = run_child([*command, str(length), column])
    return done.peak_bytes, float(json.loads(done.last_line)["seconds"])


if __name__ == "__main__":
    main()
