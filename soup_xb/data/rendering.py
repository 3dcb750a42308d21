"""Chat templates are rendered in a process of their own: transformers' sandbox, with the kernel's limits around it.

A template is a foreign program. Jinja's sandbox keeps it from files and processes, not from running on or
from filling the memory, and no watch inside an interpreter can interrupt `9 ** 9 ** 9`. A process of its own
can be ended whatever it does: `Renderer` asks it, `serve` is what it runs.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from soup_xb.core.process import python_command

# Of processor time, for one conversation; a template of today takes a thousandth of it.
SECONDS = 2.0
# A template cannot sleep; this is for a machine that swaps.
_WALL_SECONDS = 120.0
# Neither tokens nor anything else of the user's environment is passed on to foreign code.
_PASSED_ON = ("PATH", "TZ", "LANG", "LC_ALL", "LC_CTYPE", "LC_TIME", "LD_LIBRARY_PATH", "PYTHONHOME")
_SET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"}
_SERVE = "from soup_xb.data.rendering import serve; serve()"


class RunawayError(Exception):
    """The process had to be ended, or a limit stopped the template; the message says what it took too much of."""


class Renderer:
    """One rendering process, started when it is first asked and again after it was ended.

    Rendering in it costs some 50 microseconds more than in this process. `seconds` is what a conversation may
    take of processor time.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._template = ""

    def render(self, template: str, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request, as `serve` describes both. Raises RunawayError."""
        process = self._started()
        request = {**request, "seconds": self.seconds}
        if template != self._template:
            request = {**request, "template": template}
        try:
            answer = _exchange(process, json.dumps(request).encode() + b"\n")
        except BaseException:
            # An answer that nobody has read would be taken for that of the next request.
            self.close()
            raise
        if answer is None:
            self.close()
            raise RunawayError(self._why(process.returncode))
        self._template = template
        if answer.get("kind") == "MemoryError":
            raise RunawayError(f"needs more than {MEMORY_BYTES // 2**30} GiB of memory")
        return answer

    def close(self) -> None:
        """End the process; the next request starts another."""
        process, self._process, self._template = self._process, None, ""
        if process is None:
            return
        process.kill()
        process.communicate()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
            self._process = subprocess.Popen(
                python_command(_SERVE),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**kept, **_SET},
            )
        return self._process

    def _why(self, code: int) -> str:
        if code == -signal.SIGPROF:
            return f"takes more than {self.seconds:g} s of processor time for one conversation"
        if code == -signal.SIGKILL:
            return f"took more than {_WALL_SECONDS:g} s, or the system ended its process"
        return f"ended the process that renders it (exit code {code})"


@cache
def renderer() -> Renderer:
    """The renderer of this process, made when it is first asked for; its rendering process ends with this one."""
    made = Renderer()
    atexit.register(made.close)
    return made


def _exchange(process: subprocess.Popen[bytes], line: bytes) -> dict[str, Any] | None:
    """What the process answers; None where it ended instead, or had to be ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    answered = b""
    with suppress(BrokenPipeError):
        process.stdin.write(line)
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], _WALL_SECONDS)
        answered = process.stdout.readline() if ready else b""
    if not answered.endswith(b"\n"):
        process.kill()
        process.wait()
        return None
    answer: dict[str, Any] = json.loads(answered)
    return answer


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
    rendering, in characters), `seconds`, `tokens` (special tokens by name), `day` (the date that a clock in the
    template tells) and, where it is another one than before, `template`. An answer holds `text`, or `error` with
    `kind` and `line`. `kind` is the name of the exception, or `size` for a rendering beyond `room`.
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

    with _clock_at(request["day"]):
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


@contextmanager
def _clock_at(day: str) -> Iterator[None]:
    """Inside, a template's `strftime_now` tells the beginning of a day; an empty `day` changes nothing."""
    from transformers.utils import chat_template_utils

    if not day:
        yield
        return
    usual = chat_template_utils.datetime
    chat_template_utils.datetime = SimpleNamespace(now=partial(usual.fromisoformat, day))
    try:
        yield
    finally:
        chat_template_utils.datetime = usual


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
