"""What a base costs that is cut over processes: memory of each of them, and time against one process.

    python bench/sharding.py memory
    python bench/sharding.py speed --rounds 3

Memory: two processes with the whole base each (`none`) and two with a part each (`fsdp`), float32, LoRA r 4 on q_proj,
one row of 16 tokens a process, so that the base and not the activations is what is seen. The figure is the growth of
the peak resident size (VmHWM, which Linux resets on request) from before the base is opened: after opening it and one
forward through all of it, which is the base (the bar: 0.6), and after training steps, which add what both sides keep
for the way back. A mapped file counts with the pages that were read; opened and not yet used, it would show none.

Speed: seconds of one step on the same rows, on two cores. One process with two threads; then what two processes of
one thread each could do if they had nothing to say to each other (each alone on its half, then both at once, which
shows what they take from each other's memory bus); then `none` and `fsdp` with their messages.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SETTINGS = "SOUP_XB_SHARDING_BENCH"


def main() -> None:
    """Measure what is asked for and print a line for each way."""
    if SETTINGS in os.environ:
        _child(json.loads(os.environ[SETTINGS]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("memory", "speed"))
    parser.add_argument("--base", type=Path, help="a model folder; default: the demo's base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=16, help="memory: tokens of a row")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    from soup_xb.demo.base import prepare_base

    options.base = str(options.base or prepare_base())
    {"memory": _memory, "speed": _speed}[options.what](options)


def _memory(options: argparse.Namespace) -> None:
    asked = {"base": options.base, "rows": 2, "length": options.length, "steps": options.steps}
    asked |= {"threads": 1, "rank": 4}
    peaks: dict[str, list[int]] = {}
    for sharding in ("none", "fsdp"):
        told = _launch({**asked, "sharding": sharding}, processes=2)
        peaks[sharding] = [max(one[when] for one in told) for when in ("evaluated", "trained")]
        base, trained = (peak / 2**20 for peak in peaks[sharding])
        print(
            f"{sharding}: peak growth of a process {base:,.0f} MiB with a forward, {trained:,.0f} with training"
        )
    for index, when in enumerate(("the base (opening and a forward; bar: 0.6)", "with training")):
        print(f"{when}: fsdp / none {peaks['fsdp'][index] / peaks['none'][index]:.3f}")


def _speed(options: argparse.Namespace) -> None:
    asked = {"base": options.base, "rows": 4, "length": 128, "steps": options.steps, "rank": 8}
    ways = {
        "one process, two threads": ({"threads": 2, "sharding": "none"}, 1, 1),
        "half the rows, one process of one thread": ({"threads": 1, "sharding": "none", "rows": 2}, 1, 1),
        "the same, two of them at once": ({"threads": 1, "sharding": "none", "rows": 2}, 1, 2),
        "two processes, none": ({"threads": 1, "sharding": "none"}, 2, 1),
        "two processes, fsdp": ({"threads": 1, "sharding": "fsdp"}, 2, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, (settings, processes, copies) in ways.items():
            told = _launch({**asked, **settings}, processes, copies)
            seconds[name].append(max(one["step_seconds"] for one in told))
    first = statistics.median(seconds["one process, two threads"])
    for name, found in seconds.items():
        middle = statistics.median(found)
        each = ", ".join(f"{one:.2f}" for one in found)
        print(f"{name}: {middle:.2f} s a step ({each}); one process is {middle / first:.2f}x as fast")


def _launch(settings: dict[str, Any], processes: int, copies: int = 1) -> list[dict[str, Any]]:
    """What every process told, of `copies` runs at the same time."""
    with tempfile.TemporaryDirectory(prefix="sharding-") as folder:
        threads = str(settings["threads"])
        environment = {
            **os.environ, SETTINGS: json.dumps({**settings, "folder": folder}),
            "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads,
        }  # fmt: skip
        runs = [
            subprocess.Popen(
                [sys.executable, *_launcher(processes), __file__],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for _ in range(copies)
        ]
        for run in runs:
            output = run.communicate()[0]
            if run.returncode:
                sys.exit(f"a process failed:\n{output[-3000:]}")
        return [json.loads(file.read_text()) for file in sorted(Path(folder).iterdir())]


def _launcher(processes: int) -> tuple[str, ...]:
    if processes == 1:
        return ()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        str(port),
    )


def _child(asked: dict[str, Any]) -> None:
    """Open, attach, train, and leave the figures in a file of its own."""
    import numpy as np

    from soup_xb.backends.torch.load import outline_base
    from soup_xb.backends.torch.processes import join_processes
    from soup_xb.backends.torch.session import open_session
    from soup_xb.core.adapter.plan import AdapterPlan
    from soup_xb.core.base.modules import resolve_adapters
    from soup_xb.core.config.schema import LoraConfig
    from soup_xb.core.rows.batches import collate, process_share
    from soup_xb.core.rows.examples import Source
    from soup_xb.core.rows.row import TokenSequence
    from soup_xb.core.run.session import OptimizerSettings, SessionSettings, StepSettings

    settings = SessionSettings(
        base=Path(asked["base"]),
        precision="fp32",
        quantization="none",
        gradient_checkpointing=False,
        optimizer=OptimizerSettings("adamw", 0.9, 0.999, 1e-8, 0.0, 1.0),
        seed=0,
        sharding=asked["sharding"],
    )
    # The libraries' own memory is there already: the structure alone imports what opening imports.
    outline_base(settings)
    join_processes(600)
    before = _reset_peak()
    session = open_session(settings)
    told: dict[str, Any] = {"opened": _peak() - before}
    lora = LoraConfig(r=asked["rank"], target_modules="q_proj" if asked["rank"] == 4 else "auto")
    adapters = resolve_adapters(session.describe().modules, lora, {}).adapters
    session.attach(AdapterPlan(adapters, 0.0, "random", use_rslora=False, seed=0))
    drawn = np.random.default_rng(0).integers(100, 40_000, (asked["rows"], asked["length"]))
    rows = [
        TokenSequence(row, np.ones(len(row), dtype=bool), Source("rows", index))
        for index, row in enumerate(drawn)
    ]
    mine = process_share(np.arange(len(rows)), session.process, session.processes)
    batch = collate([rows[index] for index in mine], 0)
    session.evaluate([batch])
    told["evaluated"] = _peak() - before
    targets, seconds = asked["rows"] * (asked["length"] - 1), []
    for step in range(1, asked["steps"] + 1):
        started = time.perf_counter()
        session.train_step([batch], StepSettings(step, 1e-4, targets, len(rows)))
        seconds.append(time.perf_counter() - started)
    # The first step also makes buffers and connections.
    told |= {"trained": _peak() - before, "step_seconds": statistics.median(seconds[1:])}
    (Path(asked["folder"]) / f"{os.getpid()}.json").write_text(json.dumps(told))
    session.close()


def _reset_peak() -> int:
    """Begin to measure here; the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
