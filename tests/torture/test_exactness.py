"""The exactness matrix: what is trained, times where it is cut, on both backends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS = 14
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "odd tail": {"batch_size": 7, "gradient_accumulation_steps": 2},
    "evaluation": {"eval_steps": 2},
    "epoch edge": {"batch_size": 8},
    "dropout": {"lora": {"r": 4, "dropout": 0.2}},
    "pissa": {"lora": {"r": 4, "init_strategy": "pissa"}},
    "olora": {"lora": {"r": 4, "init_strategy": "olora"}},
    "patterns": {"lora": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 8}}},
    "dora": {"lora": {"r": 4, "use_dora": True}},
    "relora prune": {"relora_steps": 4, "relora_warmup_ratio": 0.0, "relora_prune_ratio": 0.8},
    "relora merge": {"relora_steps": 4, "relora_warmup_ratio": 0.0, "relora_mode": "merge"},
    "pissa relora": {
        "relora_steps": 4,
        "relora_warmup_ratio": 0.0,
        "lora": {"r": 4, "init_strategy": "pissa"},
    },
    "dpo": {"task": "dpo", "eval_steps": 2, "lora": {"r": 4, "dropout": 0.2}},
    "dpo pissa accumulation": {
        "task": "dpo",
        "gradient_accumulation_steps": 2,
        "lora": {"r": 4, "init_strategy": "pissa"},
    },
    "dpo relora merge": {
        "task": "dpo",
        "relora_steps": 4,
        "relora_warmup_ratio": 0.0,
        "relora_mode": "merge",
    },
    "simpo accumulation": {"task": "simpo", "gradient_accumulation_steps": 3},
    "cpo odd tail": {"task": "cpo", "batch_size": 7, "gradient_accumulation_steps": 2},
    "kto odd tail": {"task": "kto", "batch_size": 7, "gradient_accumulation_steps": 2},
    "bco": {"task": "bco", "eval_steps": 2},
    "reward": {"task": "reward", "eval_steps": 2, "lora": {"r": 4, "dropout": 0.2}},
    "grpo": {"task": "grpo", "eval_steps": 7, "lora": {"r": 4, "dropout": 0.2}},
    "grpo pissa accumulation": {
        "task": "grpo",
        "gradient_accumulation_steps": 2,
        "lora": {"r": 4, "init_strategy": "pissa"},
    },
    "embedding": {"task": "embedding", "eval_steps": 2, "lora": {"r": 4, "dropout": 0.2}},
    "embedding odd tail": {"task": "embedding", "batch_size": 7, "gradient_accumulation_steps": 2},
    "embedding relora merge": {
        "task": "embedding",
        "relora_steps": 4,
        "relora_warmup_ratio": 0.0,
        "relora_mode": "merge",
    },
}
# 45 rows are trained on: with 8 rows a step an epoch ends after step 6.
CUTS = (3, 6, 11)
CELLS = [
    (backend, kind)
    for kind in KINDS
    for backend in ("torch", "mlx")
    if backend == "torch" or "relora_steps" not in KINDS[kind]
]
SAMPLE = {
    ("torch", "relora merge"),
    ("torch", "odd tail"),
    ("mlx", "pissa"),
    ("mlx", "dropout"),
    ("torch", "bco"),
    ("mlx", "grpo"),
}


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        pytest.param(*cell, marks=() if cell in SAMPLE else pytest.mark.torture, id="-".join(cell))
        for cell in CELLS
    ],
)
def test_a_run_cut_anywhere_ends_as_the_whole_one(
    config: Callable[..., Path],
    soupx: Callable[..., Any],
    result: Callable[[Path], Any],
    tally: Callable[..., None],
    tmp_path: Path,
    backend: str,
    kind: str,
) -> None:
    file = config(backend, **{"max_steps": STEPS, **KINDS[kind]})
    whole = soupx("train", file, "--output", tmp_path / "whole")
    assert whole.code == 0, whole.err
    for cut in CUTS:
        out = tmp_path / f"cut-{cut}"
        # A run that a signal stops writes the same checkpoint there; the preemption tests show it.
        checkpoint = tmp_path / "whole" / "checkpoints" / f"step-{cut:08d}"
        gone_on = soupx("train", file, "--output", out, "--resume-from", checkpoint)
        assert gone_on.code == 0, gone_on.err
        weights, events = result(out)
        whole_weights, whole_events = result(tmp_path / "whole")
        assert weights == whole_weights
        assert events == [event for event in whole_events if event["step"] > cut]
        tally(f"exactness matrix, {backend}: byte-equal")
