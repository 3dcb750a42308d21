"""Programs in several processes that find each other, forked from one that has imported the frameworks once.

torchrun and mlx.launch start processes that import everything anew, some seven seconds of processor time each. What
they tell a process is its environment, and the same is told here; both launchers have tests of their own in
tests/cli/test_train_command.py.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from attrs import frozen

# All that a run imports before it starts a thread; a fork keeps the calling thread alone.
_IMPORTED = [
    "peft",
    "soup_xb.backends.mlx.session",
    "soup_xb.backends.torch.session",
    "soup_xb.cli",
    "soup_xb.data.tokenizer",
    "soup_xb.runs.train",
    "transformers.models.llama.modeling_llama",
]
_START = multiprocessing.get_context("forkserver")
_START.set_forkserver_preload(_IMPORTED)


def import_frameworks() -> None:
    """What a run imports, in this process, for children that it forks."""
    for name in _IMPORTED:
        importlib.import_module(name)


@frozen
class Ended:
    """How the processes ended, first the one of rank 0, and what all wrote to stdout and stderr."""

    codes: tuple[int | None, ...]
    out: str
    err: str


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on, all different."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def pair_of_free_ports() -> int:
    """The first of two ports in a row, as mlx.launch takes them from its `--starting-port`."""
    while True:
        (first,) = free_ports(1)
        try:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", first + 1))
        except (OSError, OverflowError):
            continue
        return first


def in_two_processes(backend: str, *words: object) -> Ended:
    """Run a program as ranks 0 and 1."""
    return in_processes(2, backend, *words)


def in_processes(count: int, backend: str, *words: object, seconds: float = 240) -> Ended:
    """Run a program of these words (`-m soup_xb …`, or a file and its arguments) as ranks from 0 to `count` - 1.

    A process that takes longer than `seconds` is killed; its code is then the negative of the signal.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running = []
        for rank, environment in enumerate(_environments(count, backend, folder)):
            given = (environment, list(map(str, words)), str(folder / f"{rank}"))
            running.append(_START.Process(target=_run, args=given))
            running[-1].start()
        for process in running:
            process.join(seconds)
            if process.exitcode is None:
                process.kill()
                process.join()
        out, err = (
            "".join((folder / f"{rank}.{kind}").read_text() for rank in range(len(running)))
            for kind in ("out", "err")
        )
        return Ended(tuple(process.exitcode for process in running), out, err)


def _environments(count: int, backend: str, folder: Path) -> list[dict[str, str]]:
    """The variables that torchrun and mlx.launch's ring set for each process."""
    ports, ranks = free_ports(count), list(map(str, range(count)))
    if backend == "torch":
        all_have = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0]), "WORLD_SIZE": str(count)}
        return [{**all_have, "RANK": rank, "LOCAL_RANK": rank} for rank in ranks]
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    return [{"MLX_HOSTFILE": str(hosts), "MLX_RANK": rank} for rank in ranks]


def _run(environment: dict[str, str], words: list[str], stem: str) -> None:
    """In the new process: become `python WORDS` with stdout and stderr in files."""
    for kind, stream in (("out", sys.stdout), ("err", sys.stderr)):
        with Path(f"{stem}.{kind}").open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(environment)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
