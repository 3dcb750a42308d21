"""The kinds of rows that a table keeps: what of a row goes into columns, and how it is made of them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import attrs
import numpy as np
from attrs import frozen

from soup_xb.core.rows.embedding_rows import EmbeddingRow
from soup_xb.core.rows.examples import TokenRow
from soup_xb.core.rows.preferences import JudgedRow, LearnedRow, PairRow
from soup_xb.core.rows.row_facts import RowFacts

Array = np.ndarray[Any, Any]


@frozen
class RowKind:
    """A kind of rows.

    `make` puts a row together of its token rows, in the order of `row.sequences`, and of what `extra` gave for it: any
    value that JSON holds, or None. `prompted` kinds have prompts that are compared.
    """

    name: str
    type: type[LearnedRow]
    make: Callable[[Sequence[TokenRow], Any], LearnedRow]
    extra: Callable[[Any], Any] | None = None
    prompted: bool = False


KINDS: Mapping[str, RowKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            RowKind("tokens", TokenRow, lambda sequences, extra: sequences[0]),
            RowKind("pair", PairRow, lambda sequences, extra: PairRow(*sequences), prompted=True),
            RowKind(
                "judged",
                JudgedRow,
                lambda sequences, extra: JudgedRow(sequences[0], extra),
                extra=lambda row: row.desirable,
                prompted=True,
            ),
            RowKind("embedding", EmbeddingRow, lambda sequences, extra: EmbeddingRow(*sequences)),
        )
    }
)


# What of a token row has columns; anything else in it has to be as it is in a row that has nothing of it.
_KEPT = ("tokens", "trained", "source")
_UNKEPT = tuple((field.name, field.default) for field in attrs.fields(TokenRow) if field.name not in _KEPT)


def kind_of(row: LearnedRow) -> RowKind | None:
    """The kind of a row, None for one that no table keeps: of another class, or with more than tokens and marks."""
    kind = next((kind for kind in KINDS.values() if type(row) is kind.type), None)
    if kind is None or any(getattr(one, name) != value for one in row.sequences for name, value in _UNKEPT):
        return None
    return kind


def facts_of_columns(counts: Array, lengths: Array, targets: Array, prompts: tuple[Array, Array]) -> RowFacts:
    """The facts of rows with so many sequences each, whose lengths, targets, prompt lengths and keys follow each other.

    A row is as long as its longest sequence, since all share one grid, and has the tokens and targets of all.
    """
    each, learned = (_grid(counts, values) for values in (lengths, targets))
    single = each.shape[1] == 1
    prompt_lengths, prompt_keys = (
        _grid(counts, values) if len(values) else np.zeros((len(counts), 0), dtype=values.dtype)
        for values in prompts
    )
    return RowFacts(
        lengths=each[:, 0] if single else each.max(axis=1),
        targets=learned[:, 0] if single else learned.sum(axis=1),
        tokens=each[:, 0] if single else each.sum(axis=1),
        sequence_lengths=each,
        sequence_targets=learned,
        prompt_lengths=prompt_lengths,
        prompt_keys=prompt_keys,
    )


def _grid(counts: Array, values: Array) -> Array:
    """Values of sequences as (rows, most sequences of a row), zeros where a row has fewer."""
    most = int(counts.max(initial=0))
    if (counts == most).all():
        return values.reshape(len(counts), most)
    grid = np.zeros((len(counts), most), dtype=values.dtype)
    grid[np.arange(most) < counts[:, None]] = values
    return grid
