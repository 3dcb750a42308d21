"""One DPO run of `mlx_lm_lora.train`, as a user of it would write it. Prints one line of JSON.

It runs in an environment with mlx-lm-lora, this package and scipy-openblas32: it multiplies with the same OpenBLAS as
soupx does. Without Metal mlx tells no recommended working set, which mlx-lm-lora asks for: there it is told 0, and the
limit is not set.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import soup_xb.backends.mlx  # noqa: F401 - loads OpenBLAS before mlx is imported


def main() -> None:
    """Train as the JSON in the first argument says."""
    task = json.loads(sys.argv[1])
    # What it prints about itself goes to stderr; the last line of stdout is ours.
    stdout, sys.stdout = sys.stdout, sys.stderr
    import mlx.core as mx
    import numpy as np
    from mlx_lm_lora import train
    from mlx_lm_lora.trainer import dpo_trainer

    if "max_recommended_working_set_size" not in mx.device_info():
        told = {**mx.device_info(), "max_recommended_working_set_size": 0}
        mx.device_info, mx.set_wired_limit = lambda *_: told, lambda _: 0
    found: dict[str, float] = {"tokens": 0, "steps": 0}
    batches, train_dpo = dpo_trainer.iterate_dpo_batches, train.train_dpo

    def counted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch in batches(*args, **kwargs):
            # A row ends at its last trained token.
            masks = [np.array(mask) for mask in batch[2:]]
            found["tokens"] += sum(int((np.cumsum(mask[:, ::-1], axis=1) > 0).sum()) for mask in masks)
            found["steps"] += 1
            yield batch

    def timed(*args: Any, **kwargs: Any) -> None:
        started, worked = time.perf_counter(), time.process_time()
        train_dpo(*args, **kwargs)
        found["seconds"] = time.perf_counter() - started
        found["cpu_seconds"] = time.process_time() - worked

    dpo_trainer.iterate_dpo_batches, train.train_dpo = counted, timed
    try:
        train.main(_settings(task))
    finally:
        sys.stdout = stdout
    print(json.dumps(found))


def _settings(task: dict[str, Any]) -> dict[str, Any]:
    place = Path(task["output"])
    place.mkdir(parents=True)
    rows = Path(task["rows"]).read_text("utf-8")
    (place / "train.jsonl").write_text(rows, "utf-8")
    return {
        "model": task["base"],
        "train": True,
        "data": str(place),
        "train_type": "lora",
        "train_mode": "dpo",
        "optimizer": "adamw",
        "seed": task["seed"],
        "num_layers": -1,
        "batch_size": task["batch_size"],
        "iters": task["steps"],
        "beta": 0.1,
        "learning_rate": task["rate"],
        "steps_per_report": 10**9,
        "steps_per_eval": 10**9,
        "save_every": 10**9,
        "adapter_path": str(place / "adapter"),
        "max_seq_length": task["max_length"],
        "fuse": False,
        "lora_parameters": {"rank": task["rank"], "dropout": 0.0, "scale": task["alpha"] / task["rank"]},
    }


if __name__ == "__main__":
    main()
