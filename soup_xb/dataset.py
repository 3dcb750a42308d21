"""Data files and hub datasets -> token rows, split for training and evaluation, with everything left out named."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from attrs import frozen

from soup_xb.core.config import DataConfig
from soup_xb.core.data import read_rows
from soup_xb.core.embedding_files import EmbeddingFacts
from soup_xb.core.embedding_formats import embedding_formats
from soup_xb.core.embedding_rows import EmbeddingRow, repeated_positives
from soup_xb.core.errors import DataError, Problem
from soup_xb.core.example_file import ExampleReader
from soup_xb.core.examples import Row
from soup_xb.core.formats import FORMATS, Formats
from soup_xb.core.judged_rows import rows_for_task
from soup_xb.core.packing import pack, packing_notice, split_long
from soup_xb.core.places import local_path
from soup_xb.core.preference_formats import EVERY_FORMAT, formats_of
from soup_xb.core.preferences import LearnedRow
from soup_xb.core.random_numbers import permutation
from soup_xb.core.rows import Rows, SelectedRows, as_rows, join_rows
from soup_xb.core.run_rules import is_local_path
from soup_xb.core.schedule import floor_share
from soup_xb.encoding import BATCH
from soup_xb.hub_dataset import hub_rows
from soup_xb.preference_rows import is_chat, tokenize_examples
from soup_xb.row_tally import RowTally
from soup_xb.tokenizer import ChatTokenizer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")


@frozen(eq=False)
class Dataset:
    """Token rows in the order of the files. `evaluation` is empty where nothing is held out."""

    train: Rows
    evaluation: Rows
    format: str
    notices: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()


@frozen(eq=False)
class TokenFile:
    """One file as token rows. `count` is the number of rows in the file, `unlearnable` of those without a target."""

    rows: Rows
    format: str
    reason: str
    count: int
    unlearnable: int
    truncated: int
    notices: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()


def load_dataset(data: DataConfig, tokenizer: ChatTokenizer, seed: int, task: str = "sft") -> Dataset:
    """The rows of a config's `data` section, packed where the task or `data.packing` says so.

    Rows held out by `val_split` depend on their number and `seed` alone. Raises DataError for a file or row
    that cannot be used, and where no row of a file has anything to learn; ModelError for conversations on a
    base without a chat template.
    """
    # Documents are cut into pieces and nothing of them is left out; rows of a task with answers are cut short.
    longest = sys.maxsize if task == "pretrain" else data.max_length
    train = [_tokenize(_reader(entry, data, task), tokenizer, longest) for entry in data.train]
    held_out = [_tokenize(_reader(entry, data, task), tokenizer, longest) for entry in data.eval]
    rows = join_rows([file.rows for file in train])
    evaluation = join_rows([file.rows for file in held_out])
    if data.val_split > 0:
        rows, evaluation = split_rows(rows, data.val_split, seed)
    rows, evaluation = (rows_for_task(part, task, data.max_length) for part in (rows, evaluation))
    notices = dict.fromkeys(notice for file in (*train, *held_out) for notice in file.notices)
    formats = ", ".join(dict.fromkeys(file.format for file in train))
    if task == "pretrain" or data.packing:
        documents = len(rows)
        rows, evaluation = _packed(rows, data.max_length), _packed(evaluation, data.max_length)
        notices[packing_notice(documents, rows, data.max_length)] = None
    warnings = dict.fromkeys(warning for file in (*train, *held_out) for warning in file.warnings)
    warnings |= dict.fromkeys(repeated_positives([row for row in rows if isinstance(row, EmbeddingRow)]))
    return Dataset(rows, evaluation, formats, tuple(notices), tuple(warnings))


def _packed(rows: Rows, length: int) -> Rows:
    return pack(split_long(rows, length), length) if len(rows) else rows


def load_file(
    path: Path,
    format: str,
    tokenizer: ChatTokenizer,
    max_length: int,
    embedding: EmbeddingFacts | None = None,
) -> tuple[Rows, tuple[Problem, ...]]:
    """The rows of one `sft` file, or of pairs for `embedding`, and what the user should know about them.

    Raises as `load_dataset` does.
    """
    formats = FORMATS
    if embedding is not None:
        formats = embedding_formats(embedding.query_prompt, embedding.document_prompt)
    file = _tokenize(ExampleReader(read_rows(path), format, str(path), formats), tokenizer, max_length)
    return file.rows, file.notices


def tokenize_file(
    path: Path, format: str, tokenizer: ChatTokenizer, max_length: int, formats: Formats = EVERY_FORMAT
) -> TokenFile:
    """One file with its counts, whichever task its rows are for. Raises as `load_dataset` does."""
    return _tokenize(ExampleReader(read_rows(path), format, str(path), formats), tokenizer, max_length)


def split_rows(rows: Sequence[LearnedRow], share: float, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out, `floor(share * rows)` of them but at least one; order is kept.

    Raises DataError where no row would be left to train on.
    """
    count = max(1, floor_share(len(rows), share))
    if count >= len(rows):
        raise DataError(
            "too-few-rows",
            f"{len(rows)} row cannot be split"
            if len(rows) == 1
            else f"{len(rows)} rows leave none to train on",
            where="data.val_split",
            help=f"add rows, or lower `data.val_split` (now {share:g}) or set it to 0.",
        )
    known = as_rows(rows)
    is_held_out = np.zeros(len(known), dtype=np.bool_)
    is_held_out[permutation(len(known), seed, "val_split")[:count]] = True
    train, held_out = (np.flatnonzero(mask) for mask in (~is_held_out, is_held_out))
    return SelectedRows(known, train), SelectedRows(known, held_out)


def _reader(entry: str, data: DataConfig, task: str) -> ExampleReader:
    path = local_path(entry)
    if is_local_path(entry) or not _HUB_ID.fullmatch(entry) or path.exists():
        rows: Iterator[Row] = read_rows(path)
    else:
        rows = hub_rows(entry, data.subset, data.split)
    formats = formats_of(task)
    if task == "embedding":
        formats = embedding_formats(data.query_prompt or "", data.document_prompt or "")
    return ExampleReader(rows, "text" if task == "pretrain" else data.format, entry, formats)


def _tokenize(reader: ExampleReader, tokenizer: ChatTokenizer, max_length: int) -> TokenFile:
    tally = RowTally(reader.name, max_length)
    rows: list[LearnedRow] = []
    examples = iter(reader)
    while batch := list(islice(examples, BATCH)):
        tally.chats |= any(is_chat(example) for example in batch)
        results = tokenize_examples(batch, tokenizer, max_length)
        tally.add(results)
        rows += (result.row for result in results if result.row is not None)
    if not rows:
        raise tally.nothing_to_learn(reader.count)
    notices = (*reader.notices(), *tally.notices(), *(tokenizer.notices() if tally.chats else ()))
    detection = reader.detection
    return TokenFile(
        rows=as_rows(rows),
        format=detection.name,
        reason=detection.reason,
        count=reader.count,
        unlearnable=reader.count - len(rows),
        truncated=tally.truncated.count,
        notices=notices,
        warnings=tuple(tally.warnings()),
    )
