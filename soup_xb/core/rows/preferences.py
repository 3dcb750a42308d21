"""The rows of preference tasks: pairs of answers, and answers that were judged one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import frozen

from soup_xb.core.rows.embedding_rows import EmbeddingRow
from soup_xb.core.rows.examples import Source, TokenRow
from soup_xb.core.rows.prompts import PromptRow

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


LearnedRow = TokenRow | PairRow | JudgedRow | EmbeddingRow | PromptRow


def side_names(row: LearnedRow) -> tuple[str, ...]:
    """What each of a row's sequences is, in a word; nothing for a row that is no preference."""
    if isinstance(row, PromptRow):
        return ("prompt",)
    if isinstance(row, PairRow):
        return ("chosen", "rejected")
    if isinstance(row, EmbeddingRow):
        return ("anchor", "positive", "negative")[: len(row.sequences)]
    if isinstance(row, JudgedRow):
        return ("desirable" if row.desirable else "undesirable", "mismatched")[: len(row.sequences)]
    return ("",)


def prompt_tokens(row: TokenRow) -> Array:
    """The tokens before the first target, int32."""
    return row.tokens[: first_target(row)]


def first_target(row: TokenRow) -> int:
    """Where the first target stands."""
    return int(np.flatnonzero(row.trained)[0])
