"""Examples -> batches of rows, in order, whatever number of processes tokenizes them.

A worker reads examples as JSON lines and answers with columns of rows.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from attrs import evolve, frozen

from soup_xb.core import errors
from soup_xb.core.errors import ResourceError, SoupError
from soup_xb.core.process import python_command
from soup_xb.core.rows.examples import AnyExample, example_of, plain, travels
from soup_xb.core.rows.row import Row
from soup_xb.core.rows.table import COLUMNS, columns_of, stored_kind
from soup_xb.data.spans import BATCH
from soup_xb.data.tokenize import RowTally, is_chat, tokenize_examples
from soup_xb.data.tokenizer import ChatTokenizer, open_tokenizer

_SERVE = "from soup_xb.data.workers import serve; serve()"
# One thread each: the processes share the processors between them.
_SET = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def tokenized(examples: Iterator[AnyExample], how: Tokenizing, processes: int) -> Iterator[Batch]:
    """Batches of the examples in their order; so many processes beside this one make them, or this one where it is 1.

    An error is raised where one process alone would raise it. Raises as `ChatTokenizer.tokenize` does, ResourceError
    where a process ends, and UnkeptRowsError where rows that have columns are followed by some that have none.
    """
    head = list(islice(examples, BATCH))
    if not head:
        return
    first = tokenize_batch(head, how)
    yield first
    # Rows that no table keeps do not travel between processes either.
    if processes > 1 and not first.rows and travels(head[0]) and _is_reopened(how):
        yield from _shared(examples, how, processes)
        return
    while batch := list(islice(examples, BATCH)):
        yield tokenize_batch(batch, how)


def _is_reopened(how: Tokenizing) -> bool:
    """Whether a process can be told the chat template as text: one without a mark would be taken for a file's name."""
    template = how.tokenizer.template
    return template is None or "{{" in template.text or "{%" in template.text


def _shared(examples: Iterator[AnyExample], how: Tokenizing, processes: int) -> Iterator[Batch]:
    helpers = [_Helper(how) for _ in range(processes)]
    free: queue.SimpleQueue[_Helper] = queue.SimpleQueue()
    for helper in helpers:
        free.put(helper)

    def ask(request: bytes) -> Batch:
        helper = free.get()
        try:
            return helper.ask(request)
        finally:
            free.put(helper)

    pool = ThreadPoolExecutor(processes)
    try:
        yield from _in_order(_requests(examples), lambda request: pool.submit(ask, request), 2 * processes)
    finally:
        for helper in helpers:
            helper.kill()
        pool.shutdown(cancel_futures=True)
        for helper in helpers:
            helper.close()


def _in_order(
    requests: Iterator[bytes], submit: Callable[[bytes], Future[Batch]], most: int
) -> Iterator[Batch]:
    """The answers in the order of the requests, of which at most so many are under way."""
    waiting: deque[Future[Batch]] = deque()
    failure: SoupError | None = None
    try:
        for request in requests:
            waiting.append(submit(request))
            if len(waiting) > most:
                yield waiting.popleft().result()
    except SoupError as error:
        failure = error
    # Rows before one that cannot be read may have errors of their own, which come first.
    while waiting:
        yield waiting.popleft().result()
    if failure is not None:
        raise failure


def _requests(examples: Iterator[AnyExample]) -> Iterator[bytes]:
    while batch := list(islice(examples, BATCH)):
        yield json.dumps([plain(example) for example in batch]).encode() + b"\n"


class _Helper:
    """One process, asked by one thread at a time."""

    def __init__(self, how: Tokenizing) -> None:
        template = how.tokenizer.template
        given = template is not None and template.where == "data.chat_template"
        setup = {
            "base": str(how.tokenizer.base),
            "template": template.text if template is not None and given else None,
            "name": how.name,
            "max_length": how.max_length,
            "train_on": how.tokenizer.train_on,
            "day": template.day if template is not None else "",
            "fingerprint": how.tokenizer.fingerprint,
        }
        self._first = json.dumps(setup).encode() + b"\n"
        self._process = subprocess.Popen(
            python_command(_SERVE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_SET},
        )

    def ask(self, request: bytes) -> Batch:
        """The batch of a request. Raises the error that the process found, and ResourceError where it ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(self._first + request)
            stdin.flush()
            self._first = b""
            line = stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "unkept" in answer:
            raise UnkeptRowsError
        if "error" in answer:
            raise _error_of(answer)
        columns = {}
        for name, size in answer["sizes"].items():
            data = stdout.read(size)
            if len(data) < size:
                raise self._ended()
            columns[name] = np.frombuffer(data, dtype=COLUMNS[name])
        return Batch(answer["kind"], columns, answer["tally"])

    def kill(self) -> None:
        """End the process; who waits for its answer gets an error."""
        self._process.kill()

    def close(self) -> None:
        """Wait for its end, when nobody asks it any more."""
        self._process.communicate()

    def _ended(self) -> SoupError:
        self._process.kill()
        code = self._process.wait()
        return ResourceError(
            "tokenizing-process-ended",
            f"a process that tokenizes rows ended (exit code {code})",
            help="the system ends processes where memory runs short: free some, and start again.",
        )


def _error_of(answer: dict[str, Any]) -> SoupError:
    kind = getattr(errors, answer["error"])
    found: SoupError = kind.of(errors.Problem(*problem) for problem in answer["problems"])
    return found


Array = np.ndarray[Any, Any]


@frozen(eq=False)
class Tokenizing:
    """How one file is tokenized: its name in messages, the tokenizer, and where rows are cut."""

    name: str
    tokenizer: ChatTokenizer
    max_length: int


class UnkeptRowsError(Exception):
    """Rows that have no columns, so that they can neither be kept nor travel between processes."""


@frozen(eq=False)
class Batch:
    """What some examples became, in order.

    Rows are `columns` where there is a `kind` for them; else `kind` is empty, and they are `rows`. `tally` is the state
    of a RowTally.
    """

    kind: str
    columns: dict[str, Array]
    tally: dict[str, Any]
    rows: Sequence[Row] = ()


def tokenize_batch(examples: Sequence[AnyExample], how: Tokenizing) -> Batch:
    """Tokenize some examples. Raises as `ChatTokenizer.tokenize` does."""
    tally = RowTally(how.name, how.max_length)
    tally.chats = any(is_chat(example) for example in examples)
    results = tokenize_examples(examples, how.tokenizer, how.max_length)
    tally.add(results)
    rows = [result.row for result in results if result.row is not None]
    kinds = {kind.name if (kind := stored_kind(row)) else "" for row in rows}
    if len(kinds) != 1 or "" in kinds or how.tokenizer.reads_files:
        return Batch("", {}, tally.state(), rows)
    return Batch(kinds.pop(), columns_of(rows), tally.state())


def serve() -> None:
    """Answer requests until stdin ends.

    The first line tells `base`, `template` (None for the base's own), `name`, `max_length`, `train_on`, `day` and the
    `fingerprint` that the tokenizer has to have; each other one is a list of examples as `core.rows.examples`
    writes them. An answer
    is a line, `kind`, `tally` and the `sizes` in bytes of the columns by name, and then those bytes; or `error`, the
    name of its class, with its `problems`; or `unkept` where rows have no columns, or the tokenizer is another one.
    """
    # Ctrl-C reaches every process of the terminal; this one ends with its parent, when stdin does.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    # Whatever a library prints must not stand between answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    setup = json.loads(sys.stdin.buffer.readline())
    tokenizer = open_tokenizer(Path(setup["base"]), setup["template"]).on_day(setup["day"])
    tokenizer = evolve(tokenizer, train_on=setup["train_on"])
    how = Tokenizing(setup["name"], tokenizer, setup["max_length"])
    same = tokenizer.fingerprint == setup["fingerprint"]
    # The parent may be gone; stdin ends then too.
    with suppress(BrokenPipeError):
        for line in sys.stdin.buffer:
            _answer([example_of(value) for value in json.loads(line)], how if same else None, answers)


def _answer(examples: Sequence[AnyExample], how: Tokenizing | None, answers: BinaryIO) -> None:
    parts: list[bytes] = []
    try:
        if how is None:
            raise UnkeptRowsError
        batch = tokenize_batch(examples, how)
        if batch.rows:
            raise UnkeptRowsError
    except SoupError as error:
        problems = [[one.code, one.message, one.where, one.help] for one in error.problems]
        told: dict[str, Any] = {"error": type(error).__name__, "problems": problems}
    except UnkeptRowsError:
        told = {"unkept": True}
    else:
        parts = [column.tobytes() for column in batch.columns.values()]
        sizes = dict(zip(batch.columns, map(len, parts), strict=True))
        told = {"kind": batch.kind, "tally": batch.tally, "sizes": sizes}
    answers.write(json.dumps(told).encode() + b"\n")
    for part in parts:
        answers.write(part)
    answers.flush()
