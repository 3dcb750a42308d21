"""One cell of the clients' tables: what a client makes of a row, asked once and kept as JSON.

A cell is asked again when the files that it read, the text, or the client's script have changed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from client_cases import slug
from client_job import Task

# Seconds between two results of a client; a model is loaded and an engine started within it, on a busy machine too.
LONGEST_WAIT = 1800
# Larger files are told apart by size and time.
HASHED_BYTES = 100 * 2**20
ERROR_LINE = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Refusal|Exit)\b.*|convert_\w+\.py: .*")


@dataclass(frozen=True)
class Client:
    """A program that reads adapters or models. `folder` is its environment's, empty for the project's own."""

    name: str
    title: str
    script: str
    folder: str = ""
    # What reads adapters in mlx-lm's form and not in PEFT's.
    mlx_lm: bool = False

    def python(self, clients: Path) -> Path:
        """The interpreter that the script runs in."""
        return clients / self.folder / "bin" / "python" if self.folder else Path(sys.executable)


REFERENCE = Client("transformers-5", "transformers 5 + PEFT", "client_transformers.py")
CLIENTS = (
    REFERENCE,
    Client(
        "transformers-4.57", "transformers 4.57 + PEFT 0.17", "client_transformers.py", "transformers-4.57"
    ),
    Client("vllm-0.31", "vLLM 0.31", "client_vllm.py", "vllm-0.31"),
    Client("vllm-0.32", "vLLM 0.32", "client_vllm.py", "vllm-0.32"),
    Client("llama.cpp", "llama.cpp", "client_llama_cpp.py", "llama-cpp"),
    Client("mlx-lm", "mlx-lm", "client_mlx_lm.py", mlx_lm=True),
)


@dataclass(frozen=True)
class Prompt:
    """What every client is given: a text with its ids, and a question to answer."""

    text: str
    tokens: Sequence[int]
    question: str
    longest_answer: int = 48


@dataclass(frozen=True)
class Cell:
    """What came of it: the largest `difference` to the reference, what was `told`, or why it was `refused`."""

    row: str
    client: str
    asks: str
    key: str
    difference: float | None = None
    told: Mapping[str, Any] | None = None
    refused: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""


@dataclass(frozen=True)
class Desk:
    """Where cells are asked: the clients' folder, with the environments in it, and what every client is given."""

    clients: Path
    prompt: Prompt

    def numbers_of(self, task: Task) -> np.ndarray[Any, Any]:
        """The reference's logits (tokens, vocabulary), from an earlier run where there was one.

        Raises UnopenedError where transformers 5 and PEFT do not open the row.
        """
        file = self.clients / "reference" / f"{self.key(REFERENCE, task)}.npy"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as scratch:
                there = Task(**{**asdict(task), "output": str(Path(scratch) / "reference")})
                failed = self.start(REFERENCE, [there], Path(scratch))
                if not Path(f"{there.output}.npy").is_file():
                    raise UnopenedError(failed or "no numbers")
                np.save(file, np.load(f"{there.output}.npy"))
        numbers: np.ndarray[Any, Any] = np.load(file, mmap_mode="r")
        return numbers

    def start(
        self, client: Client, tasks: Sequence[Task], scratch: Path, seen: Callable[[], int] = lambda: 0
    ) -> str:
        """Run a client's script on tasks; why it failed, empty where it did not.

        `seen` is called all the while and counts the results that it took. Ends the command where the environment is
        missing or broken.
        """
        job = {
            "tasks": [asdict(task) for task in tasks],
            "tokens": list(self.prompt.tokens),
            "text": self.prompt.text,
            "question": self.prompt.question,
            "longest_answer": self.prompt.longest_answer,
            "scratch": str(scratch),
            "versions": str(scratch / "versions.json"),
        }
        file = scratch / "job.json"
        file.write_text(json.dumps(job), "utf-8")
        python = client.python(self.clients)
        if not python.is_file():
            sys.exit(
                f"{python} is missing: `make clients` installs it, or leave {client.name} out with --only."
            )
        # Nothing of the project reaches a client but its files.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "LLAMA_CPP": str(self.clients / "llama.cpp" / "vendor" / "llama.cpp"),
        }
        command = [str(python), str(Path(__file__).parent / client.script), str(file)]
        log = scratch / "log.txt"
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            try:
                ended = watch(process, seen)
            finally:
                process.kill()
                process.wait()
        if not ended:
            return f"no word within {LONGEST_WAIT} s"
        failed = failure(process.returncode, log.read_text("utf-8", errors="replace"))
        if failed and not (scratch / "versions.json").is_file():
            sys.exit(
                f"{client.name} does not start: {failed}\nIts environment is {client.folder or 'the project'}."
            )
        return failed

    def key(self, client: Client, task: Task) -> str:
        """Changes with everything that the numbers depend on."""
        digest = hashlib.sha256()
        told = [
            client.name,
            task.asks,
            task.rope,
            self.prompt.text,
            self.prompt.question,
            list(self.prompt.tokens),
        ]
        digest.update(json.dumps([*told, self.prompt.longest_answer], sort_keys=True).encode())
        for script in ("client_job.py", client.script):
            digest.update((Path(__file__).parent / script).read_bytes())
        for place in (task.base, task.adapter, task.model):
            digest.update(folder_digest(Path(place)).encode() if place else b"-")
        return digest.hexdigest()[:24]


class UnopenedError(Exception):
    """Transformers 5 and PEFT do not open what soup-xb saved."""


@dataclass(frozen=True)
class Question:
    """One cell to be filled: the client's task, and that of the reference for numbers."""

    row: str
    client: Client
    task: Task
    reference: Task


def cached(desk: Desk, question: Question) -> Cell | None:
    """The cell as an earlier run left it, None where there is none or something has changed."""
    file = cell_file(desk, question)
    if not file.is_file():
        return None
    cell = Cell(**json.loads(file.read_text("utf-8")))
    return cell if cell.key == desk.key(question.client, question.task) else None


def ask(desk: Desk, client: Client, questions: Sequence[Question]) -> list[Cell]:
    """Put all questions to one client, starting it again after each refusal; every cell is kept as it comes."""
    cells: list[Cell] = []
    # Some clients serve one model at a start.
    waiting = sorted(questions, key=lambda question: question.task.whole)
    with tempfile.TemporaryDirectory(prefix="clients-") as folder:
        scratch = Path(folder)
        while waiting:
            asked = Asked(desk, scratch, waiting)
            failed = desk.start(client, asked.tasks, scratch, asked.collect)
            asked.collect()
            if asked.waiting and (failed or not asked.cells):
                asked.refuse(failed or "the script ended without a word")
            cells += asked.cells
            waiting = asked.waiting
            show(f"{client.name}: {len(cells)} of {len(questions)} {failed}")
    return cells


class Asked:
    """Questions of one start of a client: `cells` fills with what it answered, `waiting` is the rest in order."""

    def __init__(self, desk: Desk, scratch: Path, questions: Sequence[Question]) -> None:
        self.desk, self.scratch = desk, scratch
        self.waiting = list(questions)
        self.cells: list[Cell] = []
        self.tasks = [
            Task(**{**asdict(question.task), "output": str(scratch / f"{number:03d}")})
            for number, question in enumerate(questions)
        ]
        self.outputs = [Path(task.output) for task in self.tasks]

    def collect(self) -> int:
        """Take what lies there by now, and say how many results there are."""
        while self.waiting and (told := outcome(self.desk, self.waiting[0], self.outputs[0])):
            self._keep(told)
        return len(self.cells)

    def refuse(self, words: str) -> None:
        """The first question that waits was the one that the script ended at."""
        self._keep({"refused": words})

    def _keep(self, told: Mapping[str, Any]) -> None:
        self.outputs.pop(0)
        self.cells.append(keep(self.desk, self.waiting.pop(0), told, read_versions(self.scratch)))


def watch(process: subprocess.Popen[bytes], seen: Callable[[], int]) -> bool:
    """Wait for a script to end; False where it gives no result for too long."""
    count, since = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        if (now := seen()) != count:
            count, since = now, time.monotonic()
        if time.monotonic() - since > LONGEST_WAIT:
            return False
    return True


def outcome(desk: Desk, question: Question, output: Path) -> dict[str, Any] | None:
    """What a client left for a question; None where it left nothing. The file is taken away."""
    numbers, words = output.with_suffix(".npy"), output.with_suffix(".json")
    if words.is_file():
        told = json.loads(words.read_text("utf-8"))
        words.unlink()
        return {"told": told}
    if not numbers.is_file():
        return None
    found = np.load(numbers)
    numbers.unlink()
    try:
        return {
            "difference": largest_difference(found, desk.numbers_of(question.reference), desk.prompt.tokens)
        }
    except UnopenedError as error:
        return {"refused": f"{REFERENCE.title} opens it no more: {error}"}


def largest_difference(
    found: np.ndarray[Any, Any], reference: np.ndarray[Any, Any], tokens: Sequence[int]
) -> float:
    """Between logits (tokens, vocabulary), or between log-probabilities (tokens - 1) of the next tokens."""
    expected = np.asarray(reference, dtype=np.float64)
    if found.ndim == 1:
        highest = expected.max(axis=1, keepdims=True)
        totals = np.log(np.exp(expected - highest).sum(axis=1)) + highest[:, 0]
        places = np.arange(len(tokens) - 1)
        expected = expected[places, list(tokens[1:])] - totals[:-1]
    # A client may pad its vocabulary.
    found = found[..., : expected.shape[-1]]
    return float(np.abs(found - expected).max())


def keep(desk: Desk, question: Question, told: Mapping[str, Any], versions: Mapping[str, str]) -> Cell:
    """Write a cell's file."""
    key = desk.key(question.client, question.task)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    cell = Cell(
        question.row, question.client.name, question.task.asks, key, versions=versions, date=today, **told
    )
    file = cell_file(desk, question)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(cell), indent=2, sort_keys=True) + "\n", "utf-8")
    return cell


def cell_file(desk: Desk, question: Question) -> Path:
    """Where a cell is kept."""
    return desk.clients / "results" / question.client.name / f"{slug(question.row)}.{question.task.asks}.json"


def read_versions(scratch: Path) -> dict[str, str]:
    """What a client's script said of its packages; nothing where it did not start."""
    file = scratch / "versions.json"
    found: dict[str, str] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found


def failure(status: int, log: str) -> str:
    """Why a script ended: its last error, or the signal.

    >>> failure(1, "Traceback\\nValueError: rank 64 is above 16\\nbye\\n")
    'ValueError: rank 64 is above 16'
    """
    if not status:
        return ""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    return (errors or lines or [f"exit status {status}"])[-1]


def folder_digest(folder: Path) -> str:
    """Of all files of a model or an adapter."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != "README.md":
            told = file.stat()
            small = told.st_size <= HASHED_BYTES
            content = file.read_bytes() if small else f"{told.st_size} {told.st_mtime_ns}".encode()
            digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def show(line: str) -> None:
    """Progress, which is no part of the table."""
    print(line, file=sys.stderr, flush=True)
