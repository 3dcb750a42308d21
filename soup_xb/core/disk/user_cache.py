"""Where things lie that can be made again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache(name: str) -> Path:
    """The folder of one kind of them: `$XDG_CACHE_HOME/soupx/NAME`, on a Mac `~/Library/Caches/soupx/NAME`."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if chosen and Path(chosen).is_absolute():
        return Path(chosen) / "soupx" / name
    parent = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return parent / "soupx" / name
