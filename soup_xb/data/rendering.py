"""Asking the process that renders chat templates, and ending it where a template runs away."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
from contextlib import suppress
from typing import Any

from soup_xb.core.process import python_command
from soup_xb.data.render_process import MEMORY_BYTES

# Of processor time, for one conversation; a template of today takes a thousandth of it.
SECONDS = 2.0
# A template cannot sleep; this is for a machine that swaps.
_WALL_SECONDS = 120.0
# Neither tokens nor anything else of the user's environment is passed on to foreign code.
_PASSED_ON = ("PATH", "TZ", "LANG", "LC_ALL", "LC_CTYPE", "LC_TIME", "LD_LIBRARY_PATH", "PYTHONHOME")
_SET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"}
_SERVE = "from soup_xb.data.render_process import serve; serve()"


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
        """The answer to a request, as `render_process.serve` describes both. Raises RunawayError."""
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


RENDERER = Renderer()
atexit.register(RENDERER.close)


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
