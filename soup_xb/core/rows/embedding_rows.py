"""The rows of an embedding task: texts that belong together, and texts that do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from attrs import frozen

from soup_xb.core.errors import Problem
from soup_xb.core.rows.examples import Source, TokenRow


@frozen(eq=False)
class EmbeddingRow:
    """An anchor, the text that belongs to it and, where there is one, a text that does not. None has a target."""

    anchor: TokenRow
    positive: TokenRow
    negative: TokenRow | None = None

    @property
    def source(self) -> Source:
        """Where the row stands."""
        return self.anchor.source

    @property
    def sequences(self) -> tuple[TokenRow, ...]:
        """What goes through the model for this row."""
        pair = (self.anchor, self.positive)
        return pair if self.negative is None else (*pair, self.negative)

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return max(row.length for row in self.sequences)

    @property
    def real_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(row.length for row in self.sequences)

    @property
    def target_tokens(self) -> int:
        """No token is predicted."""
        return 0


def repeated_positives(rows: Sequence[EmbeddingRow]) -> list[Problem]:
    """What to know of texts that are the positive of several rows: each is a wrong answer to the other's anchor."""
    counts = Counter(row.positive.tokens.tobytes() for row in rows)
    repeated = sum(count for count in counts.values() if count > 1)
    if not repeated:
        return []
    message = (
        f"{repeated:,} of {len(rows):,} rows share their positive with another row; where two of them meet in a "
        "micro-batch, each is taken for a wrong answer to the other"
    )
    cure = "keep one row a positive, or a few among many rows."
    return [Problem("repeated-positives", message, where="data.train", help=cure)]
