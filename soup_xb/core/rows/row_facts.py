"""What a plan has to know of every row, as arrays: sizes, and for preferences which rows share a prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import frozen

from soup_xb.core.rows.examples import TokenRow
from soup_xb.core.rows.preferences import JudgedRow, LearnedRow, PairRow, prompt_tokens

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class RowFacts:
    """Facts of rows, each an array with one entry a row.

    `lengths`, `targets` and `tokens` are a row's `length`, `target_tokens` and `real_tokens`. Of its sequences, (rows,
    most sequences of a row) with zeros where a row has fewer: `sequence_lengths` and `sequence_targets`, and for
    preferences `prompt_lengths` and `prompt_keys` (equal for equal prompts); those are (rows, 0) for other rows.
    """

    lengths: Array
    targets: Array
    tokens: Array
    sequence_lengths: Array
    sequence_targets: Array
    prompt_lengths: Array
    prompt_keys: Array

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, indices: Array | slice) -> RowFacts:
        """The facts of some of the rows, in the order of `indices`."""
        return RowFacts(*(array[indices] for array in self._arrays()))

    @staticmethod
    def joined(parts: Sequence[RowFacts]) -> RowFacts:
        """The facts of rows that follow each other."""
        if len(parts) == 1:
            return parts[0]
        return RowFacts(
            *(_stacked(arrays) for arrays in zip(*(part._arrays() for part in parts), strict=True))
        )

    def _arrays(self) -> tuple[Array, ...]:
        return (
            self.lengths,
            self.targets,
            self.tokens,
            self.sequence_lengths,
            self.sequence_targets,
            self.prompt_lengths,
            self.prompt_keys,
        )


def facts_of(rows: Sequence[LearnedRow]) -> RowFacts:
    """The facts of rows that are at hand."""
    sequences = [row.sequences for row in rows]
    prompted = [
        one if isinstance(row, PairRow | JudgedRow) else () for row, one in zip(rows, sequences, strict=True)
    ]
    return RowFacts(
        lengths=np.array([row.length for row in rows], dtype=np.int32),
        targets=np.array([row.target_tokens for row in rows], dtype=np.int32),
        tokens=np.array([row.real_tokens for row in rows], dtype=np.int32),
        sequence_lengths=_grid([[row.length for row in one] for one in sequences], np.int32),
        sequence_targets=_grid([[row.target_tokens for row in one] for one in sequences], np.int32),
        prompt_lengths=_grid([[prompt_tokens(row).size for row in one] for one in prompted], np.int32),
        prompt_keys=_grid([[prompt_key(row) for row in one] for one in prompted], np.uint64),
    )


def plain_facts(lengths: Array, targets: Array) -> RowFacts:
    """The facts of rows that are one sequence each and no preference."""
    nothing = np.zeros((len(lengths), 0), dtype=np.int32)
    return RowFacts(lengths, targets, lengths, lengths[:, None], targets[:, None], nothing, nothing)


def prompt_key(row: TokenRow) -> int:
    """64 bits of a hash of the tokens before the first target."""
    digest = hashlib.blake2b(prompt_tokens(row).astype("<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _grid(values: Sequence[Sequence[int]], kind: Any) -> Array:
    grid = np.zeros((len(values), max(map(len, values), default=0)), dtype=kind)
    for index, row in enumerate(values):
        grid[index, : len(row)] = row
    return grid


def _stacked(arrays: Sequence[Array]) -> Array:
    if arrays[0].ndim == 1:
        return np.concatenate(arrays)
    widest = max(array.shape[1] for array in arrays)
    return np.concatenate([np.pad(array, ((0, 0), (0, widest - array.shape[1]))) for array in arrays])
