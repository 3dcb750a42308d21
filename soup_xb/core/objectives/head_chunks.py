"""How many logits are held at a time: the vocabulary is the widest thing in a model, and a long row has many targets.

Computed in chunks, the head's logits are thrown away after the forward and computed again for the backward: one more
product with the head, a few percent of a step. That is paid where the logits of all targets would fill a quarter of a
gigabyte; the two or three copies that a loss makes of them are then the largest thing in memory.
"""

from __future__ import annotations

# Logits of 256 MiB in float32: below, all at once.
MOST_AT_ONCE = 2**26
# Logits of 128 MiB, in which the head is still a large product.
CHUNK = 2**25


def positions_at_once(positions: int, vocabulary: int) -> int:
    """How many of `positions` go through the head together: all of them, or the chunks are of nearly equal size.

    >>> positions_at_once(1000, 50_000), positions_at_once(4000, 50_000)
    (1000, 667)
    """
    if positions * vocabulary <= MOST_AT_ONCE:
        return positions
    chunks = -(-positions // max(1, CHUNK // vocabulary))
    return -(-positions // chunks)
