"""Die at the n-th file-system call of one checkpoint save, for every n; prints how many kills there were.

Run as a program with a scenario and an empty folder. Each save happens in a forked child whose `os` functions
count their calls; the parent then reads back what the child left.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from soup_xb.core.run.checkpoint import (
    CheckpointFacts,
    newest_whole,
    read_checkpoint,
    rotate,
    write_checkpoint,
)

FACTS = CheckpointFacts("torch", 1, "c" * 64, "d" * 64, {"torch": "2.13"})
CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "chmod", "close")
DIED = 77
DONE = 0


def fill(value: float) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_file({"lora_A": np.full((8, 16), value, np.float32)}, folder / "adapter.safetensors")
        (folder / "rank-0").mkdir()
        (folder / "rank-0" / "state.json").write_text(f'{{"value": {value}}}')

    return write


def value_of(folder: Path) -> str:
    return (folder / "rank-0" / "state.json").read_text()


def add_a_step(root: Path) -> None:
    write_checkpoint(root, 20, fill(2.0), FACTS)


def replace_the_step(root: Path) -> None:
    write_checkpoint(root, 10, fill(2.0), FACTS)


def add_and_rotate(root: Path) -> None:
    write_checkpoint(root, 20, fill(2.0), FACTS)
    rotate(root, 1)


SCENARIOS = {"add": add_a_step, "replace": replace_the_step, "rotate": add_and_rotate}


def arm(nth: int) -> None:
    """Wrap the calls so that the process dies at the n-th; a `write` leaves half of its bytes before."""
    count = 0

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count < nth:
                return real(*args, **options)
            if name == "write":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            os._exit(DIED)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))


def exit_code_of(action: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        action()
        os._exit(DONE)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_and_look(root: Path, save: Callable[[Path], None], nth: int) -> bool:
    """One kill. True while the save still had calls to make."""
    shutil.rmtree(root, ignore_errors=True)
    write_checkpoint(root, 10, fill(1.0), FACTS)

    def armed() -> None:
        arm(nth)
        save(root)

    code = exit_code_of(armed)
    assert code in (DIED, DONE), code
    found, skipped = newest_whole(root)
    assert found is not None, f"no whole checkpoint after a kill at call {nth}"
    assert not skipped, skipped
    assert value_of(found.path) in ('{"value": 1.0}', '{"value": 2.0}')
    if code == DONE:
        assert value_of(found.path) == '{"value": 2.0}'
    # What is deleted loses its name first: a folder named as a checkpoint is one.
    for path in root.glob("step-*"):
        read_checkpoint(path)
    # The next save mends whatever the kill left.
    write_checkpoint(root, 30, fill(3.0), FACTS)
    names = {path.name for path in root.iterdir()}
    assert names <= {"step-00000010", "step-00000020", "step-00000030"}, names
    assert newest_whole(root)[0].step == 30
    return code == DIED


def main() -> None:
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    nth = 1
    while kill_and_look(folder / "checkpoints", SCENARIOS[scenario], nth):
        nth += 1
    print(nth - 1)


if __name__ == "__main__":
    main()
