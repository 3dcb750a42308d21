"""`soupx` with a head that takes seven targets at a time: `python chunked_run.py train FILE`.

At the end the largest number of chunks is told.
"""

from __future__ import annotations

import sys
from typing import Any

from soup_xb.backends.torch import head
from soup_xb.cli import run
from soup_xb.core.objectives import head_chunks

own, seen = head._chunked_losses, [0]


def counted(model: Any, kind: type, hidden: Any, targets: Any, how: tuple[int, float]) -> Any:
    seen.append(how[0])
    return own(model, kind, hidden, targets, how)


if __name__ == "__main__":
    head_chunks.MOST_AT_ONCE = 0
    head_chunks.CHUNK = 7 * 320
    head._chunked_losses = counted
    try:
        run()
    finally:
        print(f"at most {max(seen)} chunks", file=sys.stderr)
