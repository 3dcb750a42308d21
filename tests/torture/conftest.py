"""Runs of a tiny model that are cut, damaged or starved, and the tally of how they ended."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from case_counts import hand_over_cases


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Count cases of a suite that ended as they should; the table stands at the end of the test run."""

    def count(suite: str, cases: int = 1) -> None:
        hand_over_cases(request.node, suite, cases)

    return count


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> Callable[..., Path]:
    """Writes a config that saves after every step; keyword arguments are keys of `training`, and `task`."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(map(_pair, chat_file.read_text("utf-8").splitlines())), "utf-8")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(map(_texts, chat_file.read_text("utf-8").splitlines())), "utf-8")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(map(_prompt, chat_file.read_text("utf-8").splitlines())), "utf-8")
    (tmp_path / "rewards.py").write_text(_VOWELS, "utf-8")
    sampled = {
        "rewards": [f"{tmp_path / 'rewards.py'}:vowels"],
        "group_size": 3,
        "max_new_tokens": 5,
        "batch_size": 2,
    }
    files = {"sft": chat_file, "embedding": texts, "grpo": prompts}

    def write(backend: str, task: str = "sft", **training: Any) -> Path:
        settings = {
            "max_steps": 6,
            "save_steps": 1,
            "lr": 0.005,
            "batch_size": 4,
            "lora": {"r": 4},
            **(sampled if task == "grpo" else {}),
            **training,
        }
        content = {
            "base": str(tiny_llama),
            "backend": backend,
            "task": task,
            "data": {
                "train": str(files.get(task, pairs)),
                "val_split": 0.1,
                "max_length": 128,
            },
            "training": settings,
            "output": str(tmp_path / "out"),
        }
        file = tmp_path / "soup.yaml"
        file.write_text(json.dumps(content, indent=1))
        return file

    return write


def _pair(line: str) -> str:
    """A row of preferences out of a conversation: its answer, and that answer with doubts."""
    question, answer = json.loads(line)["messages"]
    doubtful = {**answer, "content": f"Perhaps. {answer['content'][:8]}"}
    return json.dumps({"prompt": [question], "chosen": [answer], "rejected": [doubtful]}) + "\n"


_VOWELS = """
def vowels(completion, row):
    return sum(letter in "aeiou" for letter in completion) / 8
"""


def _prompt(line: str) -> str:
    """A row to answer out of a conversation: its question."""
    question, _ = json.loads(line)["messages"]
    return json.dumps({"prompt": [question]}) + "\n"


def _texts(line: str) -> str:
    """A row of texts that belong together out of a conversation."""
    question, answer = (turn["content"] for turn in json.loads(line)["messages"])
    return json.dumps({"anchor": question, "positive": answer}) + "\n"


@pytest.fixture
def in_a_process() -> Callable[..., subprocess.Popen[str]]:
    """Start `soupx` in a process of its own, behind a launcher where one is given.

    `file_size` is the soft and the hard limit that no file may outgrow.
    """

    def start(
        *words: object,
        launcher: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        file_size: tuple[int, int] | None = None,
    ) -> subprocess.Popen[str]:
        def starve() -> None:
            if file_size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, file_size)

        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "soup_xb", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **(environment or {})},
            preexec_fn=starve,
        )

    return start


@pytest.fixture
def launched(in_a_process: Callable[..., subprocess.Popen[str]]) -> Callable[..., subprocess.Popen[str]]:
    """`launched(N, ...)` starts `soupx` as N processes behind torchrun, on a port that is free."""

    def start(processes: int, *words: object, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes), *options)
        return in_a_process(*words, launcher=(*launcher, "--master-port", str(port)))

    return start


@pytest.fixture
def result() -> Callable[[Path], tuple[str, list[dict[str, Any]]]]:
    """What a run came to: the adapter's bytes as a hash, and every event without its time."""

    def read(folder: Path) -> tuple[str, list[dict[str, Any]]]:
        weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = [
            {key: value for key, value in event.items() if key not in ("seconds", "path")}
            for event in events
            if event["event"] in ("step", "eval", "restart")
        ]
        return hashlib.sha256(weights).hexdigest(), kept

    return read
