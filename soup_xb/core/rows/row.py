"""A row as a task learns from it: token sequences of one kind, what is known beside them, and the sizes of all rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from attrs import field, frozen

from soup_xb.core.errors import Problem
from soup_xb.core.rows.examples import RowMedia, Source

Array = np.ndarray[Any, Any]


def _token_ids(array: Any) -> Array:
    return _read_only(np.asarray(array, dtype=np.int32))


def _marks(array: Any) -> Array:
    return _read_only(np.asarray(array, dtype=np.bool_))


def _weights(array: Any) -> Array | None:
    """Weights as float32; None where every one is 1."""
    if array is None:
        return None
    known = np.asarray(array, dtype=np.float32)
    return None if (known == 1).all() else _read_only(known)


def _read_only(array: Array) -> Array:
    view = array.view()
    view.setflags(write=False)
    return view


@frozen(eq=False)
class TokenSequence:
    """Tokens that go through the model together.

    `tokens` is int32 (length,); `trained` is bool (length,): True where the token is a target, that is, where
    the model learns to predict it. The first token is never a target, since nothing comes before it.
    `documents` is where the documents in it begin; there is more than one after packing. `media` are the pictures or
    sounds that its tokens stand for. `weights` is what each token counts for in the loss where it is a target, float32
    (length,) above 0; None where each counts for 1.
    """

    tokens: Array = field(converter=_token_ids)
    trained: Array = field(converter=_marks)
    source: Source
    documents: tuple[int, ...] = (0,)
    media: RowMedia | None = None
    weights: Array | None = field(default=None, converter=_weights)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.tokens.size)

    @property
    def target_tokens(self) -> int:
        """Number of targets."""
        return int(self.trained[1:].sum())

    @property
    def target_weight(self) -> float:
        """The sum of its targets' weights."""
        if self.weights is None:
            return float(self.target_tokens)
        return float(self.weights[1:][self.trained[1:]].sum(dtype=np.float64))

    @property
    def first_target(self) -> int:
        """The place of the first target."""
        return int(np.flatnonzero(self.trained)[0])

    @property
    def prompt(self) -> Array:
        """The tokens before the first target, int32."""
        return self.tokens[: self.first_target]

    @property
    def position_ids(self) -> Array:
        """The place of each token in its own document, int32 (length,)."""
        starts = np.array(self.documents)
        lengths = np.diff(starts, append=self.length)
        return np.arange(self.length, dtype=np.int32) - np.repeat(starts, lengths).astype(np.int32)


@frozen
class RowKind:
    """A kind of rows: what its sequences are.

    `sides` names them, in order; the last ones may be absent. Those from `learned` on have no part in a row's length
    and targets: they are evaluated and never trained on. `prompted` rows have prompts that are compared. `stored` rows
    have a form on the disk: their `extra` is a JSON value.
    """

    name: str
    sides: tuple[str, ...]
    learned: int = 3
    prompted: bool = False
    stored: bool = True


# The names are part of the fingerprints in checkpoints.
KINDS: Mapping[str, RowKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            # One sequence.
            RowKind("tokens", ("",)),
            # A prompt with two answers, the better one first.
            RowKind("pair", ("chosen", "rejected"), prompted=True),
            # An answer; `extra` says whether answers should be like it. `mismatched` is its prompt with another's
            # answer, on which kto measures how far the model drifted from the base.
            RowKind("judged", ("", "mismatched"), learned=1, prompted=True),
            # A text, one that belongs to it, and one that does not.
            RowKind("embedding", ("anchor", "positive", "negative")),
            # A prompt that the model answers; `extra` is a `Prompt`.
            RowKind("prompt", ("prompt",), stored=False),
        )
    }
)


@frozen
class Prompt:
    """What a row of prompts has beside its tokens.

    `columns` is the row of the data file, for rewards. `number` is the row's place among those of its set, which the
    random numbers of its answers come from.
    """

    columns: Mapping[str, Any] = field(hash=False)
    number: int = 0


@frozen(eq=False)
class Row:
    """Sequences of one kind of KINDS, and what the kind knows beside them in `extra`."""

    kind: str
    sequences: tuple[TokenSequence, ...]
    extra: Any = None

    @property
    def source(self) -> Source:
        """Where the row stands."""
        return self.sequences[0].source

    @property
    def sides(self) -> tuple[str, ...]:
        """What each of the sequences is, in a word; nothing for a row of one text."""
        names = KINDS[self.kind].sides
        if self.kind == "judged":
            names = ("desirable" if self.extra else "undesirable", *names[1:])
        return names[: len(self.sequences)]

    @property
    def length(self) -> int:
        """Tokens of its longest sequence: all share one grid."""
        return max(one.length for one in self._learned)

    @property
    def target_tokens(self) -> int:
        """Targets of its sequences."""
        return sum(one.target_tokens for one in self._learned)

    @property
    def target_weight(self) -> float:
        """The sum of the weights of its targets."""
        return sum(one.target_weight for one in self._learned)

    @property
    def real_tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(one.length for one in self.sequences)

    @property
    def _learned(self) -> tuple[TokenSequence, ...]:
        return self.sequences[: KINDS[self.kind].learned]


def text_row(tokens: Any, trained: Any, source: Source, weights: Any = None) -> Row:
    """A row of one sequence."""
    return Row("tokens", (TokenSequence(tokens, trained, source, weights=weights),))


def same_answers(row: Row) -> bool:
    """Whether all sequences of a row are the same tokens: there is nothing to prefer."""
    first, *others = row.sequences
    return all(np.array_equal(first.tokens, other.tokens) for other in others)


def same_prompts(row: Row) -> bool:
    """Whether the prompt of all sequences of a row is the same tokens."""
    first, *others = row.sequences
    return all(np.array_equal(first.prompt, other.prompt) for other in others)


def repeated_positives(rows: Sequence[Row]) -> list[Problem]:
    """What to know of texts that are the positive of several rows: each is a wrong answer to the other's anchor."""
    counts = Counter(row.sequences[1].tokens.tobytes() for row in rows)
    repeated = sum(count for count in counts.values() if count > 1)
    if not repeated:
        return []
    message = (
        f"{repeated:,} of {len(rows):,} rows share their positive with another row; where two of them meet in a "
        "micro-batch, each is taken for a wrong answer to the other"
    )
    cure = "keep one row a positive, or a few among many rows."
    return [Problem("repeated-positives", message, where="data.train", help=cure)]


@frozen(eq=False)
class RowFacts:
    """What a plan has to know of every row: facts, each an array with one entry a row.

    `lengths`, `targets`, `weights` and `tokens` are a row's `length`, `target_tokens`, `target_weight` and
    `real_tokens`. Of its sequences, (rows,
    most sequences of a row) with zeros where a row has fewer: `sequence_lengths` and `sequence_targets`, and for
    rows with prompts `prompt_lengths` and `prompt_keys` (equal for equal prompts); those are (rows, 0) for other rows.
    """

    lengths: Array
    targets: Array
    tokens: Array
    sequence_lengths: Array
    sequence_targets: Array
    prompt_lengths: Array
    prompt_keys: Array
    weights: Array

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
            self.weights,
        )


def facts_of(rows: Sequence[Row]) -> RowFacts:
    """The facts of rows that are at hand."""
    sequences = [row.sequences for row in rows]
    prompted = [row.sequences if KINDS[row.kind].prompted else () for row in rows]
    return RowFacts(
        lengths=np.array([row.length for row in rows], dtype=np.int32),
        targets=np.array([row.target_tokens for row in rows], dtype=np.int32),
        tokens=np.array([row.real_tokens for row in rows], dtype=np.int32),
        sequence_lengths=_listed([[one.length for one in row] for row in sequences], np.int32),
        sequence_targets=_listed([[one.target_tokens for one in row] for row in sequences], np.int32),
        prompt_lengths=_listed([[one.first_target for one in row] for row in prompted], np.int32),
        prompt_keys=_listed([[prompt_key(one) for one in row] for row in prompted], np.uint64),
        weights=np.array([row.target_weight for row in rows], dtype=np.float64),
    )


def plain_facts(lengths: Array, targets: Array, weights: Array) -> RowFacts:
    """The facts of rows that are one sequence each and have no prompt."""
    nothing = np.zeros((len(lengths), 0), dtype=np.int32)
    return RowFacts(lengths, targets, lengths, lengths[:, None], targets[:, None], nothing, nothing, weights)


def facts_of_columns(
    counts: Array, lengths: Array, targets: tuple[Array, Array], prompts: tuple[Array, Array]
) -> RowFacts:
    """The facts of rows with so many sequences each, of which everything follows each other.

    `targets` are their numbers and the sums of their weights, `prompts` the prompts' lengths and keys. A row is as long
    as its longest sequence, since all share one grid, and has the tokens and targets of all.
    """
    each, learned, weights = (_spread(counts, values) for values in (lengths, *targets))
    single = each.shape[1] == 1
    prompt_lengths, prompt_keys = (
        _spread(counts, values) if len(values) else np.zeros((len(counts), 0), dtype=values.dtype)
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
        weights=weights.sum(axis=1),
    )


def prompt_key(sequence: TokenSequence) -> int:
    """64 bits of a hash of the tokens before the first target."""
    digest = hashlib.blake2b(sequence.prompt.astype("<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _listed(values: Sequence[Sequence[int]], kind: Any) -> Array:
    grid = np.zeros((len(values), max(map(len, values), default=0)), dtype=kind)
    for index, row in enumerate(values):
        grid[index, : len(row)] = row
    return grid


def _spread(counts: Array, values: Array) -> Array:
    """Values of sequences as (rows, most sequences of a row), zeros where a row has fewer."""
    most = int(counts.max(initial=0))
    if (counts == most).all():
        return values.reshape(len(counts), most)
    grid = np.zeros((len(counts), most), dtype=values.dtype)
    grid[np.arange(most) < counts[:, None]] = values
    return grid


def _stacked(arrays: Sequence[Array]) -> Array:
    if arrays[0].ndim == 1:
        return np.concatenate(arrays)
    widest = max(array.shape[1] for array in arrays)
    return np.concatenate([np.pad(array, ((0, 0), (0, widest - array.shape[1]))) for array in arrays])
