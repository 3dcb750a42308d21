"""Whether a base keeps the documents of one sequence apart, measured before a packed run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from soup_xb.core.errors import ModelError
from soup_xb.core.rows.batches import collate
from soup_xb.core.rows.packing import joined_documents
from soup_xb.core.rows.row import Row, TokenSequence
from soup_xb.core.rows.table import as_rows
from soup_xb.core.run.session import Session

# Two short documents show whether the second sees the first; rounding is far smaller than what that does.
_PROBE = 48
_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


def check_apart(session: Session, rows: Sequence[Row], pad_id: int) -> None:
    """Raise ModelError where the base lets a document see the one before it in its sequence.

    Models with a recurrent state do. Two documents are evaluated together and one by one.
    """
    packed = as_rows(rows).first_packed
    if packed is None:
        return
    first, second = (_probe(packed, index) for index in (0, 1))
    together = session.evaluate([collate([joined_documents([first, second])], pad_id)]).total
    alone = session.evaluate([collate([row], pad_id) for row in (first, second)]).total
    if abs(together - alone) > _TOLERANCE[session.precision] * max(1.0, alone):
        raise ModelError(
            "documents-not-apart",
            f"this base ({session.describe().model_type}) lets a document see the one before it in its sequence "
            f"(loss {together:.4f} together, {alone:.4f} alone)",
            where="data.packing",
            help="such a base takes one document a row: remove `data.packing`, or use `task: sft` with text rows.",
        )


def _probe(row: TokenSequence, index: int) -> TokenSequence:
    """The beginning of one document of a packed row, every token of it a target."""
    starts = (*row.documents, row.length)
    tokens = row.tokens[starts[index] : starts[index + 1]][:_PROBE]
    return TokenSequence(tokens, np.arange(tokens.size) > 0, row.source)
