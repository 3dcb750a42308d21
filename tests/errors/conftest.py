"""One row of the error table: arrange a mistake, run the command as a shell would, look at what the user sees.

A row is a dict, so that a file of rows reads as a table:

- `argv`: the words after `soupx`, as one text
- `text`: the content of soup.yaml, text or bytes; `arrange`: a function of the folder that makes the mistake
- `env`: variables of the environment, None to take one away; `stdin`: what is typed
- `exit`, `code`: the exit code and the word in `error[...]`, or a list of words where several are told at once
- `where`: how the place of the first error begins; `words`, `help`: parts of its message and of its help line
- `tells`: parts of stderr besides (warnings, notices)
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

Case = dict[str, Any]

# What each command may print besides errors: progress, notices, warnings.
_SHAPE = re.compile(r"^error\[([a-z][a-z0-9]*(?:-[a-z0-9]+)*)\] (.+)$")
_KEYS = {"argv", "text", "arrange", "env", "stdin", "exit", "code", "where", "words", "help", "tells"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row meets a launcher's environment, a person's own templates or the network."""
    from huggingface_hub import constants

    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MLX_RANK",
        "MLX_WORLD_SIZE",
        "MLX_HOSTFILE",
        "SOUPX_DEBUG",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def workplace(tmp_path: Path, tiny_llama: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a config, its data and a base of its own, to be spoiled."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(tiny_llama, tmp_path / "base")
    shutil.copy(chat_file, tmp_path / "train.jsonl")
    (tmp_path / "soup.yaml").write_text(json.dumps(least(), indent=1))
    return tmp_path


def least(backend: str = "torch") -> dict[str, Any]:
    """A config that trains for a moment."""
    return {
        "base": "./base",
        "backend": backend,
        "data": {"train": "train.jsonl", "max_length": 128},
        "training": {"max_steps": 4, "save_steps": 2, "lora": {"r": 4}},
        "output": "out",
    }


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, chat_file: Path
) -> Callable[[str], Path]:
    """The output folder of a finished run of a backend, made once; copy it before you touch it."""
    from soup_xb.core.config.load import parse_config
    from soup_xb.runs.resume import TrainOptions
    from soup_xb.runs.train import train

    made: dict[str, Path] = {}

    def folder(backend: str) -> Path:
        if backend not in made:
            place = tmp_path_factory.mktemp(f"trained-{backend}")
            shutil.copytree(tiny_llama, place / "base")
            shutil.copy(chat_file, place / "train.jsonl")
            with pytest.MonkeyPatch.context() as patch:
                # The run's settings name base and data as every row's config does.
                patch.chdir(place)
                train(parse_config(json.dumps(least(backend)), "soup.yaml"), TrainOptions(), [])
            made[backend] = place / "out"
        return made[backend]

    return folder


@pytest.fixture
def spoiled_run(workplace: Path, trained: Callable[[str], Path]) -> Callable[[str], Path]:
    """Puts a copy of a finished run into the workplace, as `out`."""

    def put(backend: str = "torch") -> Path:
        shutil.copytree(trained(backend), workplace / "out", symlinks=True)
        return workplace / "out"

    return put


@pytest.fixture
def check(
    soupx: Callable[..., Any], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Case], Any]]:
    """Runs one row and asserts everything that it says; gives the answer for more."""

    def run(case: Case) -> Any:
        assert set(case) <= _KEYS, set(case) - _KEYS
        if "text" in case:
            content = case["text"]
            (workplace / "soup.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        if "arrange" in case:
            case["arrange"](workplace)
        for name, value in case.get("env", {}).items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.stdin", io.StringIO(case.get("stdin", "")))
        answer = soupx(*shlex.split(case["argv"]))
        _judge(case, answer)
        return answer

    yield run


def _judge(case: Case, answer: Any) -> None:
    shown = answer.err
    assert answer.code == case["exit"], shown
    assert "Traceback" not in shown
    codes = case.get("code", [])
    codes = [codes] if isinstance(codes, str) else codes
    errors = _errors(shown)
    assert [code for code, _, _ in errors] == codes, shown
    for part in _listed(case.get("tells", ())):
        assert part in shown
    if not errors:
        return
    _, head, help = errors[0]
    where = case.get("where", "")
    assert head.startswith(where), shown
    message = head.removeprefix(where)
    for part in _listed(case.get("words", ())):
        assert part in message, shown
    assert case.get("help", "") in help, shown
    steering = [char for char in shown if not char.isprintable() and char != "\n"]
    assert not steering, steering


def _errors(shown: str) -> list[tuple[str, str, str]]:
    """Code, the rest of the line, and the help line of each error."""
    lines = shown.splitlines()
    found = []
    for line, following in zip_longest(lines, lines[1:], fillvalue=""):
        if line.startswith("error"):
            match = _SHAPE.match(line)
            assert match, line
            help = following.removeprefix("  help: ") if following.startswith("  help: ") else ""
            found.append((match[1], match[2], help))
    return found


def _listed(parts: str | tuple[str, ...]) -> tuple[str, ...]:
    return (parts,) if isinstance(parts, str) else parts
