"""What a client's script is given, and how it answers: one job file in, one file a task out.

It runs in each client's own environment, so it uses numpy and the standard library alone. A script works through its
tasks in order and catches nothing: where a client refuses a task, the script ends with that error, and the driver
(`clients.py`) notes it and starts the script again with the tasks that are left. A script may also stop early.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Task:
    """One thing to open, and what to tell of it.

    `asks` is `numbers` (logits of the job's tokens, or log-probabilities of each next token), `answer` (a greedy answer
    to the job's question) or `tokenizer` (the ids of the job's text). Either `model` is a whole model's folder, or
    `adapter`, where there is one, lies on `base`. `rope` is what the base's positions are changed by. `output` is the
    path of the result without its ending.
    """

    asks: str
    base: str
    output: str
    adapter: str | None = None
    model: str | None = None
    rope: dict[str, Any] | None = None

    @property
    def whole(self) -> str:
        """The folder of the model that the adapter, if any, lies on."""
        return self.model or self.base


@dataclass(frozen=True)
class Job:
    """Tasks for one client. `tokens` are the ids of `text`; `scratch` is a folder for the client's own files."""

    tasks: Sequence[Task]
    tokens: Sequence[int]
    text: str
    question: str
    longest_answer: int
    scratch: str
    versions: str

    @property
    def turns(self) -> list[dict[str, str]]:
        """The question as a conversation."""
        return [{"role": "user", "content": self.question}]


def read_job(packages: Sequence[str]) -> Job:
    """The job that the command line names; the versions of `packages` are noted for the driver."""
    told = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    job = Job(**{**told, "tasks": [Task(**task) for task in told["tasks"]]})
    versions = {name: importlib.metadata.version(name) for name in packages}
    Path(job.versions).write_text(json.dumps(versions), "utf-8")
    return job


def save_numbers(task: Task, numbers: Any) -> None:
    """Write an array: logits (tokens, vocabulary), or the log-probabilities of tokens 1, 2, … (tokens - 1)."""
    file = Path(f"{task.output}.npy")
    part = file.with_suffix(".part.npy")
    np.save(part, np.asarray(numbers, dtype=np.float32))
    part.replace(file)


def save_told(task: Task, **told: Any) -> None:
    """Write an answer (`stopped`, `tokens`, `text`) or token `ids`."""
    file = Path(f"{task.output}.json")
    part = file.with_suffix(".part.json")
    part.write_text(json.dumps(told), "utf-8")
    part.replace(file)
