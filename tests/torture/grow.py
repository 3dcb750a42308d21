"""`grow.py FILE WARM`: train a config and print by how much memory, descriptors and children grew after WARM steps."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def resident() -> int:
    """Bytes of this process that are in memory and its own."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def children() -> int:
    tasks = Path("/proc/self/task").iterdir()
    return sum(len((task / "children").read_text().split()) for task in tasks)


def slope(points: list[tuple[int, int]]) -> float:
    """Least squares of bytes over steps."""
    mean_step = sum(step for step, _ in points) / len(points)
    mean_size = sum(size for _, size in points) / len(points)
    above = sum((step - mean_step) * (size - mean_size) for step, size in points)
    return above / sum((step - mean_step) ** 2 for step, _ in points)


def main() -> None:
    from soup_xb.core.config.load import load_config
    from soup_xb.core.run.events import Event, SaveEvent, StepEvent
    from soup_xb.runs.resume import TrainOptions
    from soup_xb.runs.train import train

    points: list[tuple[int, int]] = []
    open_files: list[int] = []
    saves, warm = 0, int(sys.argv[2])

    def listen(event: Event) -> None:
        nonlocal saves
        saves += isinstance(event, SaveEvent)
        if isinstance(event, StepEvent) and event.step >= warm and event.step % 20 == 0:
            points.append((event.step, resident()))
            open_files.append(descriptors())

    train(load_config(Path(sys.argv[1])), TrainOptions(overwrite=True), [listen])
    print(
        json.dumps(
            {
                "mebibytes_per_1000_steps": slope(points) * 1000 / 2**20,
                "descriptors": open_files[-1] - open_files[0],
                "children": children(),
                "saves": saves,
            }
        )
    )


if __name__ == "__main__":
    main()
