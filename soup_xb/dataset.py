"""Data files and hub datasets -> token rows, split for training and evaluation, with everything left out named."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from attrs import frozen

from soup_xb.core.config import DataConfig
from soup_xb.core.data import read_rows
from soup_xb.core.errors import DataError, Problem
from soup_xb.core.example_file import ExampleReader
from soup_xb.core.examples import ChatExample, Row, TokenRow
from soup_xb.core.packing import pack, packing_notice, split_long
from soup_xb.core.places import local_path
from soup_xb.core.random_numbers import permutation
from soup_xb.core.run_rules import is_local_path
from soup_xb.core.schedule import floor_share
from soup_xb.encoding import BATCH
from soup_xb.hub_dataset import hub_rows
from soup_xb.tokenizer import ChatTokenizer, Tokenized

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
# Places named in a notice; the count says how many more there are.
_NAMED = 3


@frozen(eq=False)
class Dataset:
    """Token rows in the order of the files. `evaluation` is empty where nothing is held out."""

    train: tuple[TokenRow, ...]
    evaluation: tuple[TokenRow, ...]
    format: str
    notices: tuple[Problem, ...]


@frozen(eq=False)
class TokenFile:
    """One file as token rows. `count` is the number of rows in the file, `unlearnable` of those without a target."""

    rows: tuple[TokenRow, ...]
    format: str
    reason: str
    count: int
    unlearnable: int
    truncated: int
    notices: tuple[Problem, ...]


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
    rows = tuple(row for file in train for row in file.rows)
    evaluation = tuple(row for file in held_out for row in file.rows)
    if data.val_split > 0:
        rows, evaluation = split_rows(rows, data.val_split, seed)
    notices = dict.fromkeys(notice for file in (*train, *held_out) for notice in file.notices)
    formats = ", ".join(dict.fromkeys(file.format for file in train))
    if task == "pretrain" or data.packing:
        documents = len(rows)
        rows, evaluation = _packed(rows, data.max_length), _packed(evaluation, data.max_length)
        notices[packing_notice(documents, rows, data.max_length)] = None
    return Dataset(rows, evaluation, formats, tuple(notices))


def _packed(rows: Sequence[TokenRow], length: int) -> tuple[TokenRow, ...]:
    return pack([piece for row in rows for piece in split_long(row, length)], length)


def load_file(
    path: Path, format: str, tokenizer: ChatTokenizer, max_length: int
) -> tuple[tuple[TokenRow, ...], tuple[Problem, ...]]:
    """The token rows of one file, and what the user should know about them. Raises as `load_dataset` does."""
    file = tokenize_file(path, format, tokenizer, max_length)
    return file.rows, file.notices


def tokenize_file(path: Path, format: str, tokenizer: ChatTokenizer, max_length: int) -> TokenFile:
    """One file with its counts. Raises as `load_dataset` does."""
    return _tokenize(ExampleReader(read_rows(path), format, str(path)), tokenizer, max_length)


def split_rows(
    rows: Sequence[TokenRow], share: float, seed: int
) -> tuple[tuple[TokenRow, ...], tuple[TokenRow, ...]]:
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
    held_out = set(permutation(len(rows), seed, "val_split")[:count].tolist())
    train = tuple(row for index, row in enumerate(rows) if index not in held_out)
    return train, tuple(rows[index] for index in sorted(held_out))


def _reader(entry: str, data: DataConfig, task: str) -> ExampleReader:
    path = local_path(entry)
    if is_local_path(entry) or not _HUB_ID.fullmatch(entry) or path.exists():
        rows: Iterator[Row] = read_rows(path)
    else:
        rows = hub_rows(entry, data.subset, data.split)
    return ExampleReader(rows, "text" if task == "pretrain" else data.format, entry)


def _tokenize(reader: ExampleReader, tokenizer: ChatTokenizer, max_length: int) -> TokenFile:
    tally = _Tally(reader.name, max_length)
    rows: list[TokenRow] = []
    examples = iter(reader)
    while batch := list(islice(examples, BATCH)):
        tally.chats |= any(isinstance(example, ChatExample) for example in batch)
        results = tokenizer.tokenize_many(batch, max_length)
        tally.add(results)
        rows += (result.row for result in results if result.row is not None)
    if not rows:
        raise tally.nothing_to_learn(reader.count)
    notices = (*reader.notices(), *tally.notices(), *(tokenizer.notices() if tally.chats else ()))
    detection = reader.detection
    return TokenFile(
        rows=tuple(rows),
        format=detection.name,
        reason=detection.reason,
        count=reader.count,
        unlearnable=reader.count - len(rows),
        truncated=tally.truncated.count,
        notices=notices,
    )


class _Places:
    """A count with the first few places."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, place: object) -> None:
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(str(place))

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return ", ".join(self.first) + (f" and {more:,} more" if more else "")


class _Tally:
    """What happened to the rows of a file."""

    def __init__(self, name: str, max_length: int) -> None:
        self.chats = False
        self.truncated = _Places()
        self._name, self._max_length = name, max_length
        self._reasons: Counter[str] = Counter()
        self._unlearnable, self._rewritten, self._hidden = _Places(), _Places(), _Places()

    def add(self, results: Iterable[Tokenized]) -> None:
        for result in results:
            if result.row is None:
                self._reasons[result.reason] += 1
                self._unlearnable.add(f"{result.source} ({result.reason})")
            for happened, places in (
                (result.truncated and result.row is not None, self.truncated),
                (result.rewritten and result.row is not None, self._rewritten),
                (result.hidden, self._hidden),
            ):
                if happened:
                    places.add(result.source)

    def nothing_to_learn(self, count: int) -> DataError:
        reasons = "; ".join(f"{reason} ({rows:,})" for reason, rows in self._reasons.most_common())
        return DataError(
            "nothing-to-learn",
            f"there is nothing to learn in any of the {count:,} rows: {reasons}",
            where=self._name,
            help="an assistant turn, a completion or a text is what a model learns from; "
            "`soupx data FILE --base BASE` shows the trained tokens.",
        )

    def notices(self) -> Iterator[Problem]:
        """What should be known, worst first; a count of zero says nothing."""
        told = (
            ("rows-without-targets", "left out, with nothing to learn", self._unlearnable),
            ("truncated", f"cut at {self._max_length:,} tokens (`data.max_length`)", self.truncated),
            (
                "rewritten-turns",
                "with an assistant turn that the chat template changes, which is not trained on",
                self._rewritten,
            ),
            ("hidden-turns", "with a turn that the chat template changes or leaves out", self._hidden),
        )
        for code, what, places in told:
            if places.count:
                rows = "1 row" if places.count == 1 else f"{places.count:,} rows"
                yield Problem(code, f"{rows} {what}: {places}", where=self._name)
