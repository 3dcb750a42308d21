"""The rows of preference tasks: pairs of answers, and answers that were judged one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from attrs import evolve, frozen

from soup_xb.core.config import JUDGED
from soup_xb.core.examples import Source, TokenRow

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class PairRow:
    """A prompt with two answers, each a row of its own: what is trained on is the answer."""

    chosen: TokenRow
    rejected: TokenRow

    @property
    def source(self) -> Source:
        """Where the row stands."""
        return self.chosen.source

    @property
    def sequences(self) -> tuple[TokenRow, ...]:
        """What goes through the model for this row."""
        return (self.chosen, self.rejected)

    @property
    def length(self) -> int:
        """Tokens of the longer side: both sides share one grid."""
        return max(self.chosen.length, self.rejected.length)

    @property
    def real_tokens(self) -> int:
        """Tokens of both sides."""
        return self.chosen.length + self.rejected.length

    @property
    def target_tokens(self) -> int:
        """Targets of both sides."""
        return self.chosen.target_tokens + self.rejected.target_tokens

    @property
    def is_equal(self) -> bool:
        """Whether both sides are the same tokens: there is nothing to prefer."""
        return np.array_equal(self.chosen.tokens, self.rejected.tokens)

    @property
    def shares_prompt(self) -> bool:
        """Whether the prompt is the same tokens on both sides."""
        return np.array_equal(prompt_tokens(self.chosen), prompt_tokens(self.rejected))


@frozen(eq=False)
class JudgedRow:
    """An answer and its verdict.

    `mismatched` is the same prompt with an answer to another one: KTO measures on it how far the model drifted
    from the base. It is evaluated, never trained on.
    """

    answer: TokenRow
    desirable: bool
    mismatched: TokenRow | None = None

    @property
    def source(self) -> Source:
        """Where the row stands."""
        return self.answer.source

    @property
    def sequences(self) -> tuple[TokenRow, ...]:
        """What goes through the model for this row."""
        return (self.answer,) if self.mismatched is None else (self.answer, self.mismatched)

    @property
    def length(self) -> int:
        """Tokens of the answer with its prompt."""
        return self.answer.length

    @property
    def real_tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(row.length for row in self.sequences)

    @property
    def target_tokens(self) -> int:
        """Targets of the answer."""
        return self.answer.target_tokens


LearnedRow = TokenRow | PairRow | JudgedRow


def side_names(row: LearnedRow) -> tuple[str, ...]:
    """What each of a row's sequences is, in a word; nothing for a row that is no preference."""
    if isinstance(row, PairRow):
        return ("chosen", "rejected")
    if isinstance(row, JudgedRow):
        return ("desirable" if row.desirable else "undesirable", "mismatched")[: len(row.sequences)]
    return ("",)


def prompt_tokens(row: TokenRow) -> Array:
    """The tokens before the first target, int32."""
    return row.tokens[: _first_target(row)]


def rows_for_task(rows: Sequence[LearnedRow], task: str, max_length: int) -> tuple[LearnedRow, ...]:
    """The rows as a task learns them: kto and bco judge the two sides of a pair one by one.

    KTO's rows get their mismatched answers here, once for the whole set, so that neither the order of rows, nor
    accumulation, nor the number of processes has a part in them.
    """
    if task not in JUDGED:
        return tuple(rows)
    judged = list(_judged(rows))
    return tuple(_with_mismatches(judged, max_length) if task == "kto" else judged)


def _judged(rows: Iterable[LearnedRow]) -> Iterator[JudgedRow]:
    for row in rows:
        if isinstance(row, PairRow):
            yield JudgedRow(row.chosen, desirable=True)
            yield JudgedRow(row.rejected, desirable=False)
        elif isinstance(row, JudgedRow):
            yield row


def _with_mismatches(rows: Sequence[JudgedRow], max_length: int) -> list[JudgedRow]:
    """Each row with the answer of the next row that has another prompt; where all share one, of the next row."""
    prompts = [prompt_tokens(row.answer).tobytes() for row in rows]
    following, partners = 0, [0] * len(rows)
    # Twice around, from the end: the first time the end does not know yet what the beginning holds.
    for index in reversed(range(2 * len(rows))):
        here, after = index % len(rows), (index + 1) % len(rows)
        following = after if prompts[after] != prompts[here] else partners[after]
        partners[here] = following
    if len(set(prompts)) == 1:
        partners = [(index + 1) % len(rows) for index in range(len(rows))]
    return [
        evolve(row, mismatched=_swapped(row.answer, rows[partner].answer, max_length))
        for row, partner in zip(rows, partners, strict=True)
    ]


def _swapped(row: TokenRow, other: TokenRow, max_length: int) -> TokenRow:
    """The prompt of one row with the answer of another, cut from the right."""
    start, answer = _first_target(row), _first_target(other)
    tokens = np.concatenate([row.tokens[:start], other.tokens[answer:]])[:max_length]
    trained = np.concatenate([np.zeros(start, dtype=np.bool_), other.trained[answer:]])[:max_length]
    return TokenRow(tokens, trained, row.source)


def _first_target(row: TokenRow) -> int:
    return int(np.flatnonzero(row.trained)[0])
