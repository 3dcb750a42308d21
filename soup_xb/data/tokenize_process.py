"""A process that tokenizes examples which another one reads: JSON lines in, columns of rows out."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from attrs import frozen

from soup_xb.core.errors import SoupError
from soup_xb.core.rows.example_lines import example_of
from soup_xb.core.rows.examples import AnyExample
from soup_xb.core.rows.preferences import LearnedRow
from soup_xb.core.rows.row_kinds import kind_of
from soup_xb.core.rows.row_table import columns_of
from soup_xb.data.row_tally import RowTally
from soup_xb.data.tokenize import is_chat, tokenize_examples
from soup_xb.data.tokenizer import ChatTokenizer, open_tokenizer

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
    rows: Sequence[LearnedRow] = ()


def tokenize_batch(examples: Sequence[AnyExample], how: Tokenizing) -> Batch:
    """Tokenize some examples. Raises as `ChatTokenizer.tokenize` does."""
    tally = RowTally(how.name, how.max_length)
    tally.chats = any(is_chat(example) for example in examples)
    results = tokenize_examples(examples, how.tokenizer, how.max_length)
    tally.add(results)
    rows = [result.row for result in results if result.row is not None]
    kinds = {kind.name if (kind := kind_of(row)) else "" for row in rows}
    if len(kinds) != 1 or "" in kinds or how.tokenizer.reads_files:
        return Batch("", {}, tally.state(), rows)
    return Batch(kinds.pop(), columns_of(rows), tally.state())


def serve() -> None:
    """Answer requests until stdin ends.

    The first line tells `base`, `template` (None for the base's own), `name`, `max_length` and the `fingerprint` that
    the tokenizer has to have; each other one is a list of examples as `core.rows.example_lines` writes them. An answer
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
    tokenizer = open_tokenizer(Path(setup["base"]), setup["template"])
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
