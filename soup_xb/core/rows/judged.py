"""Rows as a task learns from them: judged answers out of pairs, mismatched answers, and numbered prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from attrs import evolve

from soup_xb.core.rows.row import Prompt, Row, RowFacts, TokenSequence
from soup_xb.core.rows.table import Rows, as_rows, combined

Array = np.ndarray[Any, Any]


def learned_rows(rows: Sequence[Row], kind: str, max_length: int, mismatched: bool = False) -> Rows:
    """The rows as a task of a row kind learns from them: the two sides of a pair are judged one by one for `judged`.

    With `mismatched` each judged answer gets a mismatched one here, once for the whole set, so that neither the order
    of rows, nor accumulation, nor the number of processes has a part in them.
    """
    known = as_rows(rows)
    if kind == "prompt":
        return NumberedPrompts(known)
    if kind != "judged" or not known:
        return known
    judged = JudgedAnswers(known)
    return MismatchedAnswers(judged, max_length) if mismatched else judged


class NumberedPrompts(Rows):
    """Prompts, each of which knows its own place."""

    def __init__(self, rows: Rows) -> None:
        self._rows, self.facts = rows, rows.facts

    def row(self, index: int) -> Row:
        """The row of a number."""
        row = self._rows.row(index)
        return evolve(row, extra=Prompt(row.extra.columns, index))

    @cached_property
    def fingerprint(self) -> str:
        """That of the prompts."""
        return combined("prompts", self._rows.fingerprint)


class JudgedAnswers(Rows):
    """Judged answers out of rows that are judged already, or pairs: there the chosen one, then the rejected one."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        counts = 1 + rows.pairs.astype(np.int64)
        self._owners = np.repeat(np.arange(len(rows)), counts)
        self._sides = np.arange(len(self._owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        one = (self._owners, self._sides)
        facts = rows.facts
        lengths, targets = facts.sequence_lengths[one], facts.sequence_targets[one]
        self.facts = RowFacts(
            lengths=lengths,
            targets=targets,
            tokens=lengths,
            sequence_lengths=lengths[:, None],
            sequence_targets=targets[:, None],
            prompt_lengths=facts.prompt_lengths[one][:, None],
            prompt_keys=facts.prompt_keys[one][:, None],
            # Losses over judged answers are divided by their number.
            weights=targets.astype(np.float64),
        )

    def row(self, index: int) -> Row:
        """The row of a number."""
        row = self._rows.row(int(self._owners[index]))
        if row.kind != "pair":
            return row
        side = int(self._sides[index])
        return Row("judged", (row.sequences[side],), extra=side == 0)

    @cached_property
    def fingerprint(self) -> str:
        """That of the rows they are made of."""
        return combined("judged", self._rows.fingerprint)


class MismatchedAnswers(Rows):
    """Judged answers, each with that of the next row with another prompt; where all share one, of the next row."""

    def __init__(self, rows: JudgedAnswers, max_length: int) -> None:
        self._rows, self._longest = rows, max_length
        facts = rows.facts
        partners = mismatched_partners(facts.prompt_keys[:, 0])
        self._partners = partners
        answers = (facts.lengths - facts.prompt_lengths[:, 0])[partners]
        others = np.minimum(facts.prompt_lengths[:, 0] + answers, max_length)
        self.facts = RowFacts(
            lengths=facts.lengths,
            targets=facts.targets,
            tokens=facts.lengths + others,
            sequence_lengths=np.stack([facts.lengths, others], axis=1),
            # What is never trained on has no targets to count.
            sequence_targets=np.stack([facts.targets, np.zeros_like(others)], axis=1),
            prompt_lengths=facts.prompt_lengths,
            prompt_keys=facts.prompt_keys,
            weights=facts.weights,
        )

    def row(self, index: int) -> Row:
        """The row of a number."""
        row, other = self._rows.row(index), self._rows.row(int(self._partners[index]))
        answer = row.sequences[0]
        return evolve(row, sequences=(answer, _swapped(answer, other.sequences[0], self._longest)))

    @cached_property
    def fingerprint(self) -> str:
        """That of the answers, and whose is whose mismatched one."""
        return combined("mismatched", self._rows.fingerprint, self._partners, str(self._longest))


def mismatched_partners(prompts: Array) -> Array:
    """For each row the next one around the circle with another prompt; where all share one, the next one.

    >>> mismatched_partners(np.array([7, 7, 8, 9])).tolist()
    [2, 2, 3, 0]
    """
    following = (np.arange(len(prompts)) + 1) % len(prompts)
    last_of_runs = np.flatnonzero(prompts != prompts[following])
    if not len(last_of_runs):
        return following
    runs = np.searchsorted(last_of_runs, np.arange(len(prompts))) % len(last_of_runs)
    return following[last_of_runs[runs]]


def _swapped(row: TokenSequence, other: TokenSequence, max_length: int) -> TokenSequence:
    """The prompt of one row with the answer of another, cut from the right."""
    answer = other.first_target
    tokens = np.concatenate([row.prompt, other.tokens[answer:]])[:max_length]
    trained = np.concatenate([np.zeros(row.first_target, dtype=np.bool_), other.trained[answer:]])[
        :max_length
    ]
    weights = None
    if other.weights is not None:
        before = np.ones(row.first_target, dtype=np.float32)
        weights = np.concatenate([before, other.weights[answer:]])[:max_length]
    return TokenSequence(tokens, trained, row.source, weights=weights)
