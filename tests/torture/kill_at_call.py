"""Die at the n-th file-system call of one save of a real run, then resume; for every n, or every stride-th.

    python kill_at_call.py CONFIG OUTPUT STRIDE

Everything is imported once; each run is a forked child. Prints how many kills there were; the exit code is not 0
where a resumed run does not end with the adapter of the uninterrupted one.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "chmod", "close")
DIED, ARMED_SAVE = 77, 3


def run(config: Path, output: Path, *options: str) -> int:
    from soup_xb.cli import run as soupx

    sys.argv = ["soupx", "train", str(config), "--output", str(output), *options]
    try:
        soupx()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def in_a_child(action: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(action())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def armed(nth: int) -> None:
    """Let the process die at the n-th call of its third save."""
    from soup_xb.runs.writer import RunWriter

    real_save, saves = RunWriter.save, 0

    def save(self: RunWriter, step: int) -> None:
        nonlocal saves
        saves += 1
        if saves != ARMED_SAVE:
            real_save(self, step)
            return
        give_back = count_calls(nth)
        real_save(self, step)
        give_back()

    RunWriter.save = save  # type: ignore[method-assign]


def count_calls(nth: int) -> Callable[[], None]:
    count = 0
    real = {name: getattr(os, name) for name in CALLS}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count < nth:
                return real[name](*args, **options)
            if name == "write":
                real[name](args[0], bytes(args[1])[: len(args[1]) // 2])
            os._exit(DIED)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))

    def give_back() -> None:
        for name, function in real.items():
            setattr(os, name, function)

    return give_back


def weights(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def main() -> None:
    config, output, stride = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    whole = output.with_name("whole")
    assert in_a_child(lambda: run(config, whole)) == 0
    kills, nth = 0, 1
    while True:
        shutil.rmtree(output, ignore_errors=True)

        def dying(nth: int = nth) -> int:
            armed(nth)
            return run(config, output)

        code = in_a_child(dying)
        if code == 0:
            break
        assert code == DIED, f"call {nth}: exit {code}"
        assert in_a_child(lambda: run(config, output, "--resume")) == 0, f"call {nth}: did not resume"
        assert weights(output) == weights(whole), f"call {nth}: another adapter"
        kills, nth = kills + 1, nth + stride
    print(kills)


if __name__ == "__main__":
    # Once, before the children; a run imports most of these at their first use.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from processes import import_frameworks

    import_frameworks()
    main()
