"""Data files and hub datasets -> token rows, split for training and evaluation, with everything left out named."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from attrs import evolve, frozen

from soup_xb.core.config.run_rules import STREAMED_FILE, is_local_path
from soup_xb.core.config.schema import DataConfig
from soup_xb.core.disk import local_path
from soup_xb.core.errors import ConfigError, DataError, Problem
from soup_xb.core.random_numbers import permutation
from soup_xb.core.rows.files import read_rows
from soup_xb.core.rows.formats.detect import FORMATS, Formats
from soup_xb.core.rows.formats.every import EVERY_FORMAT, formats_named
from soup_xb.core.rows.judged import learned_rows
from soup_xb.core.rows.packing import pack, packing_notice, split_long
from soup_xb.core.rows.row import Row, repeated_positives
from soup_xb.core.rows.table import Rows, SelectedRows, as_rows, join_rows
from soup_xb.core.run.schedule import floor_share
from soup_xb.core.run.session import Session
from soup_xb.core.tasks import TASKS
from soup_xb.core.tasks.task import Task
from soup_xb.data.goal import Goal
from soup_xb.data.hub import HubStream, hub_rows
from soup_xb.data.token_file import DataSource, Reading, TokenFile, token_file
from soup_xb.data.tokenizer import ChatTokenizer
from soup_xb.data.workers import Tokenizing

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")


@frozen(eq=False)
class Dataset:
    """Token rows in the order of the files. `evaluation` is empty where nothing is held out."""

    train: Rows
    evaluation: Rows
    format: str
    notices: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()


def check_files(data: DataConfig) -> None:
    """Raise DataError for a local file that cannot be read at all, before anything is loaded or downloaded for it."""
    for entry in (*data.train, *data.eval):
        if _is_local(entry):
            read_rows(local_path(entry))


def load_dataset(
    data: DataConfig, tokenizer: ChatTokenizer, seed: int, task: Task = TASKS["sft"], goal: Goal | None = None
) -> Dataset:
    """The rows of a config's `data` section, packed where the task or `data.packing` says so.

    Rows held out by `val_split` depend on their number and `seed` alone. With a `goal` the training rows are streamed
    from the hub, until there are so many. Raises DataError for a file or row
    that cannot be used, and where no row of a file has anything to learn; ModelError for conversations on a
    base without a chat template.
    """
    # Documents are cut into pieces and nothing of them is left out; rows of a task with answers are cut short.
    longest = sys.maxsize if task.packing == "always" else data.max_length
    cut = (evolve(tokenizer, train_on=data.train_on), longest)
    train = [
        _token_file(entry, data, task, cut)
        if goal is None
        else _streamed(entry, data, task, cut, (goal, seed))
        for entry in data.train
    ]
    held_out = [_token_file(entry, data, task, cut) for entry in data.eval]
    rows = join_rows([file.rows for file in train])
    evaluation = join_rows([file.rows for file in held_out])
    if data.val_split > 0:
        rows, evaluation = split_rows(rows, data.val_split, seed)
    rows, evaluation = (
        learned_rows(part, task.kind, data.max_length, task.needs_mismatched) for part in (rows, evaluation)
    )
    notices = dict.fromkeys(notice for file in (*train, *held_out) for notice in file.notices)
    formats = ", ".join(dict.fromkeys(file.format for file in train))
    if task.packing == "always" or data.packing:
        documents = len(rows)
        rows, evaluation = _packed(rows, data.max_length), _packed(evaluation, data.max_length)
        notices[packing_notice(documents, rows, data.max_length)] = None
    warnings = dict.fromkeys(warning for file in (*train, *held_out) for warning in file.warnings)
    if task.embeds:
        warnings |= dict.fromkeys(repeated_positives(rows))
    return Dataset(rows, evaluation, formats, tuple(notices), tuple(warnings))


def _packed(rows: Rows, length: int) -> Rows:
    return pack(split_long(rows, length), length) if len(rows) else rows


def load_file(
    path: Path, format: str, tokenizer: ChatTokenizer, max_length: int, formats: Formats = FORMATS
) -> tuple[Rows, tuple[Problem, ...]]:
    """The rows of one file in one of `formats`, and what the user should know about them.

    Raises as `load_dataset` does.
    """
    file = tokenize_file(path, format, tokenizer, max_length, formats)
    return file.rows, file.notices


def tokenize_file(
    path: Path, format: str, tokenizer: ChatTokenizer, max_length: int, formats: Formats = EVERY_FORMAT
) -> TokenFile:
    """One file with its counts, whichever task its rows are for. Raises as `load_dataset` does."""
    return tokenize_as(path, Reading(format, formats), tokenizer, max_length)


def tokenize_as(path: Path, reading: Reading, tokenizer: ChatTokenizer, max_length: int) -> TokenFile:
    """One file as `reading` says. Raises as `load_dataset` does."""
    return token_file(_local(str(path), path), reading, Tokenizing(str(path), tokenizer, max_length))


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[Rows, Rows]:
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


def _token_file(entry: str, data: DataConfig, task: Task, cut: tuple[ChatTokenizer, int]) -> TokenFile:
    """One entry of the config's data, tokenized and cut at so many tokens."""
    path = local_path(entry)
    if _is_local(entry):
        source = _local(entry, path)
    else:
        found = hub_rows(entry, data.subset, data.split)
        source = DataSource(entry, entry, found.__iter__, found.files, (data.subset or "", data.split))
    return token_file(source, _reading(data, task), Tokenizing(entry, *cut))


def _streamed(
    entry: str, data: DataConfig, task: Task, cut: tuple[ChatTokenizer, int], taken: tuple[Goal, int]
) -> TokenFile:
    """The first rows of a hub dataset in the order of a seed, tokenized and cut at so many tokens."""
    goal, seed = taken
    if _is_local(entry):
        text, help = STREAMED_FILE
        raise ConfigError("streaming-local-data", f"`{entry}` {text}", where="data.train", help=help)
    stream = HubStream(entry, data.subset, data.split, seed)
    deciding = (data.subset or "", data.split, stream.revision, str(seed))
    source = DataSource(entry, entry, stream.rows, extra=deciding, goal=goal, told=stream.told)
    found = token_file(source, _reading(data, task), Tokenizing(entry, *cut))
    return evolve(found, notices=(*stream.notices, *found.notices))


def _is_local(entry: str) -> bool:
    return is_local_path(entry) or not _HUB_ID.fullmatch(entry) or local_path(entry).exists()


def _reading(data: DataConfig, task: Task) -> Reading:
    prompts = (data.query_prompt or "", data.document_prompt or "")
    return Reading(
        data.format,
        formats_named(task.formats, task.media, prompts),
        prompts if any(prompts) else (),
        not task.samples,
        data.columns,
    )


def _local(name: str, path: Path) -> DataSource:
    # A file that cannot be read at all is an error before anybody asks for its size.
    read_rows(path)
    return DataSource(name, str(path), partial(read_rows, path), (path,))


# Bits of a fingerprint that fit a whole number of every engine.
_DIGITS = 7


def check_same_rows(session: Session, rows: Rows) -> None:
    """Raise DataError, on every process, where one has other rows than another; it waits for all of them.

    A dataset may move on while processes start: each asks the hub for the commit that it is at.
    """
    if session.processes == 1:
        return
    mine = int(rows.fingerprint[:_DIGITS], 16)
    if session.agree(mine) != -session.agree(-mine):
        raise DataError(
            "rows-differ",
            "the processes read different rows: the dataset changed on the hub while they started",
            where="data.train",
            help="start again.",
        )
