"""What a checkpoint costs: the time of a save against that of a step, on the real model.

    python bench/save.py --backend torch --steps 12

One run saves after every step, with adapters of rank 16 on all linear layers and AdamW: factors and two moments, each
file synced and hashed. The table shows the medians of saves and of steps, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from rows import docstring_rows

from soup_xb.core.config.load import load_config
from soup_xb.core.run.events import Event, SaveEvent, StepEvent
from soup_xb.demo.base import prepare_base
from soup_xb.runs.resume import TrainOptions
from soup_xb.runs.train import train

CONFIG = """
base: {base}
task: sft
backend: {backend}
data: {{train: {data}, max_length: 256}}
training:
  max_steps: {steps}
  batch_size: 4
  save_steps: 1
  save_total_limit: 2
  lora: {{r: 16, alpha: 32}}
output: {output}
"""


def main() -> None:
    """Train, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    steps: list[float] = []
    saves: list[float] = []
    sizes: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepEvent):
            steps.append(event.seconds)
        if isinstance(event, SaveEvent):
            saves.append(event.seconds)
            sizes.append(event.bytes)

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in docstring_rows(64)), "utf-8")
        file = Path(folder) / "soup.yaml"
        file.write_text(
            CONFIG.format(
                base=prepare_base(),
                backend=options.backend,
                data=data,
                steps=options.steps,
                output=Path(folder) / "out",
            )
        )
        train(load_config(file), TrainOptions(), [listen])
    step, save = statistics.median(steps), statistics.median(saves)
    size = f"{sizes[-1] / 2**20:.0f} MiB"
    print(f"{options.backend}: step {step:.2f} s, save {save:.2f} s of {size}: {save / step:.2f} of a step")


if __name__ == "__main__":
    main()
