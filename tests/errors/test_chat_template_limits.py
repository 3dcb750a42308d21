"""A chat template is a foreign program: it ends within its time and memory, or the run does, with one message."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from soup_xb.core.errors import ModelError
from soup_xb.core.rows.examples import Message
from soup_xb.data.chat_template import ChatTemplate, RenderError
from soup_xb.data.rendering import Renderer, RunawayError, renderer

TURNS = [Message("user", "How are you?"), Message("assistant", "Well.")]

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
RUNAWAYS = {
    "nested loops": (LOOPS, "processor time"),
    "loops over the turns' letters": (
        "{% for a in 'x' * 1000000 %}{% for b in 'x' * 1000000 %}{% endfor %}{% endfor %}",
        "processor time",
    ),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "processor time",
    ),
    "one operation that nothing in Python interrupts": ("{{ (9 ** (9 ** 9)) % 7 }}", "processor time"),
    "a text of 100 GB": ("{{ ('x' * 10 ** 11) | length }}", "memory"),
    "a padded number": ("{{ '%999999999999d' % 1 }}", "memory"),
    "a text in place of each letter": ("{% set s = 'x' * 1000000 %}{{ s.replace('x', s) }}", "memory"),
}


@pytest.fixture(autouse=True)
def _short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer(), "seconds", 0.2)


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, {"eos_token": "</s>"}, "data.chat_template")


@pytest.mark.parametrize("name", RUNAWAYS)
def test_a_template_that_runs_away_is_ended_and_named(name: str) -> None:
    text, words = RUNAWAYS[name]
    with pytest.raises(ModelError, match=words) as caught:
        template(text).render(TURNS)
    assert caught.value.problems[0].code == "runaway-chat-template"


def test_after_a_runaway_the_next_template_is_rendered() -> None:
    with pytest.raises(ModelError):
        template(LOOPS).render(TURNS)
    plain = template("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    assert plain.render(TURNS) == "How are you?</s>Well.</s>"


def test_templates_take_turns_in_one_process() -> None:
    first, second = template("{{ messages[0].content }}"), template("{{ messages[1].content }}")
    answers = [one.render(TURNS) for one in (first, second, first, second)]
    assert answers == ["How are you?", "Well."] * 2


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError"),
        ("{{ raise_exception('no') }}", "TemplateError"),
        ("{% for m in [1] %}" * 25 + "{% endfor %}" * 25, "SyntaxError"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError"),
        ("{% for i in range(100000) %}{{ 'abcdefghijklmnopqrstuvwxyz' }}{% endfor %}", "size"),
    ],
)
def test_what_the_sandbox_refuses_is_the_template_s_own_failure(text: str, kind: str) -> None:
    with pytest.raises(RenderError) as caught:
        template(text).render(TURNS)
    assert caught.value.kind == kind
    assert str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="this system does not show environments")
def test_the_rendering_process_knows_no_token_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "c" * 34)
    renderer = Renderer()
    renderer.render("x", request())
    assert renderer._process is not None
    environment = Path(f"/proc/{renderer._process.pid}/environ").read_bytes()
    renderer.close()
    assert b"HF_HUB_OFFLINE" in environment
    assert b"HF_TOKEN" not in environment


def test_a_process_that_somebody_kills_is_told_and_replaced() -> None:
    renderer = Renderer()
    assert renderer.render("{{ 1 }}", request())["text"] == "1"
    assert renderer._process is not None
    os.kill(renderer._process.pid, signal.SIGKILL)
    renderer._process.wait()
    with pytest.raises(RunawayError, match="the system ended its process"):
        renderer.render("{{ 1 }}", request())
    assert renderer.render("{{ 2 }}", request())["text"] == "2"
    renderer.close()
    renderer.close()


def request() -> dict[str, Any]:
    return {
        "turns": [{"role": "user", "content": "a"}],
        "tools": [],
        "generation_prompt": False,
        "room": 99,
        "tokens": {},
        "day": "",
    }
