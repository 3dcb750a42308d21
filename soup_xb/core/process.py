"""Starting another Python process of our own, with the same places to import from as this one."""

from __future__ import annotations

import json
import sys

_BEGIN = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "


def python_command(statement: str) -> list[str]:
    """The words that run `statement` in a new process; words after them are its `sys.argv[1:]`.

    `python -m` would look for modules in the current folder first, which may be anybody's.
    """
    return [sys.executable, "-c", _BEGIN + statement, json.dumps(sys.path)]
