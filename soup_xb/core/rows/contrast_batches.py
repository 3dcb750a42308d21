"""Micro-batches of texts to embed, and which of them belong together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import evolve

from soup_xb.core.rows.batches import Contrast, MicroBatch, collate, process_share
from soup_xb.core.rows.embedding_rows import EmbeddingRow


def contrast_batch(rows: Sequence[EmbeddingRow], share_of: tuple[int, int], pad_id: int) -> MicroBatch:
    """One process's share (its number, and how many there are) of a micro-batch.

    Candidates are counted through the whole micro-batch, first all positives, then the negatives of the rows that have
    one: their order, and with it the loss, is the same for any number of processes.
    """
    own = process_share(np.arange(len(rows)), *share_of)
    hard = [index for index, row in enumerate(rows) if row.negative is not None]
    mine = [place for place, index in enumerate(hard) if index in own]
    negatives = [rows[hard[place]].negative for place in mine]
    candidates = [rows[index].positive for index in own] + [row for row in negatives if row is not None]
    contrast = Contrast(
        candidates=collate(candidates, pad_id),
        count=len(rows) + len(hard),
        places=np.concatenate([own, np.array(mine, dtype=np.int64) + len(rows)]).astype(np.int64),
        right=own.astype(np.int64),
    )
    return evolve(collate([rows[index].anchor for index in own], pad_id), contrast=contrast)
