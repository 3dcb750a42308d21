"""The process that renders chat templates: transformers' sandbox, with the kernel's limits around it.

A template is a foreign program. Jinja's sandbox keeps it from files and processes, not from running on or
from filling the memory, and no watch inside an interpreter can interrupt `9 ** 9 ** 9`. A process of its own
can be ended whatever it does.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

MEMORY_BYTES = 2 * 2**30
# What the code in a template can raise, besides Jinja's own errors. Python's compiler refuses deep loops.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def serve() -> None:
    """Answer requests, one JSON object a line, until stdin ends.

    A request holds `turns`, `tools` (JSON schemas of functions), `generation_prompt`, `room` (the longest
    rendering, in characters), `seconds`, `tokens` (special tokens by name) and, where it is another one than
    before, `template`. An answer holds `text`, or `error` with `kind` and `line`. `kind` is the name of the
    exception, or `size` for a rendering beyond `room`.
    """
    # Ctrl-C reaches every process of the terminal; this one ends with its parent, when stdin does.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    import transformers.utils.chat_template_utils  # noqa: F401 - its size belongs to the limit

    _limit_memory()
    template = ""
    for line in sys.stdin.buffer:
        request = json.loads(line)
        template = request.get("template", template)
        answer = json.dumps(_answer(template, request)).encode() + b"\n"
        # The parent may be gone; stdin ends then too.
        with suppress(BrokenPipeError):
            sys.stdout.buffer.write(answer)
            sys.stdout.buffer.flush()


def _answer(template: str, request: dict[str, Any]) -> dict[str, Any]:
    import jinja2

    # Processor time, so that a busy machine changes nothing; the signal's default action ends the process.
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    try:
        text = _rendered(template, request)
    except (*_FAILURES, jinja2.TemplateError, MemoryError) as error:
        message = getattr(error, "message", None) or str(error)
        return {"error": message, "kind": type(error).__name__, "line": getattr(error, "lineno", None)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    if len(text) > request["room"]:
        message = f"the rendering of {len(text):,} characters is far longer than the turns in it"
        return {"error": message, "kind": "size", "line": None}
    return {"text": text}


def _rendered(template: str, request: dict[str, Any]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations=[request["turns"]],
        tools=request["tools"] or None,
        chat_template=template,
        add_generation_prompt=request["generation_prompt"],
        continue_final_message=False,
        **request["tokens"],
    )
    text: str = rendered[0]
    return text


def _limit_memory() -> None:
    """Linux holds a process to its address space; macOS does not, and there the time limit stands alone."""
    import resource

    statm = Path("/proc/self/statm")
    if not statm.exists():
        return
    limit = int(statm.read_text("ascii").split()[0]) * resource.getpagesize() + MEMORY_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
