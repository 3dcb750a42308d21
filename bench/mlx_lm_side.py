"""One run of `mlx_lm.lora`, as a user of it would write it. Prints one line of JSON.

With `"fast_blas": true` in the task it multiplies with the same OpenBLAS as soupx does, else with what its
wheel brings along.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Train as the JSON in the first argument says."""
    task = json.loads(sys.argv[1])
    if task["fast_blas"]:
        import soup_xb.backends.mlx  # noqa: F401 - loads OpenBLAS before mlx is imported
    from mlx_lm import lora

    seconds: list[float] = []
    original = lora.train

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = original(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return result

    lora.train = timed
    place = Path(task["output"])
    _write_rows(Path(task["rows"]), place)
    config = place / "lora.json"
    config.write_text(json.dumps(_config(task, place)), encoding="utf-8")
    sys.argv = ["mlx_lm.lora", "--config", str(config)]
    # What it prints about itself goes to stderr; the last line of stdout is ours.
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        lora.main()
    finally:
        sys.stdout = stdout
    print(json.dumps({"seconds": seconds[0]}))


def _write_rows(rows: Path, place: Path) -> None:
    """The rows as conversations, in the files that it looks for; one of them as the validation set it insists on."""
    lines = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        content = "\n\n".join(text for text in (row["instruction"], row["input"]) if text)
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": row["output"]}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    place.mkdir(parents=True)
    (place / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    (place / "valid.jsonl").write_text("".join(lines[:4]), encoding="utf-8")


def _config(task: dict[str, Any], place: Path) -> dict[str, Any]:
    return {
        "model": task["base"],
        "train": True,
        "data": str(place),
        "fine_tune_type": "lora",
        "optimizer": "adamw",
        "seed": task["seed"],
        "num_layers": -1,
        "batch_size": task["batch_size"],
        "iters": task["steps"],
        "val_batches": 0,
        "learning_rate": task["rate"],
        "steps_per_report": 10,
        "steps_per_eval": 10**9,
        "save_every": 10**9,
        "adapter_path": str(place / "adapter"),
        "max_seq_length": task["max_length"],
        "mask_prompt": True,
        "lora_parameters": {
            "rank": task["rank"],
            "scale": task["alpha"] / task["rank"],
            "dropout": 0.0,
        },
    }


if __name__ == "__main__":
    main()
