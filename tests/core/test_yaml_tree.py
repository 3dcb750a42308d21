"""YAML that is hostile, broken or unusual: one message, never a traceback, and soon."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from soup_xb.core.config.load import parse_config
from soup_xb.core.config.yaml import read_yaml
from soup_xb.core.errors import ConfigError, SoupError


def problem_code(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "soup.yaml")
    return caught.value.problems[0].code


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("a:\n\tb: 1", 2, "line 2, column 1: a tab is used for indentation"),
        ("\ta: 1", 1, "a tab is used"),
        ('a: "x\nb: 1', 1, "line 1, column 4: a quote is opened and never closed"),
        ("a: 'x", 1, "a quote is opened and never closed"),
        ("a: [1, 2\nb: 3\n", 1, "a `[` is opened"),
        ("a: {b: 1\n", 1, "a `{` is opened"),
        ("a: b: c", 1, "a `:` where no key can stand"),
        ("a: 1\n b: 2", 2, "a `:` where no key can stand"),
        ("- a\nb: 1", 2, "a list entry, key or bracket where it does not fit"),
        ("a: @x", 1, "cannot start any token"),
        ("a: }", 1, "`}` where a value is expected"),
        ("a: [", 1, "the text ends where a value is expected"),
        ("a: 1\nword\nb: 2", 2, "a key without a `:`"),
    ],
)
def test_a_syntax_error_is_told_in_words_with_line_and_column(text: str, line: int, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "soup.yaml")
    (problem,) = caught.value.problems
    assert problem.code == "yaml-syntax"
    assert problem.where == f"soup.yaml:{line}"
    assert part in problem.message
    assert problem.help


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a: !!python/object/apply:os.system [id]", "yaml-tag"),
        ("!x\na: 1", "yaml-tag"),
        ("a: &b 1", "yaml-alias"),
        ("a: *b", "yaml-alias"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", "yaml-alias"),
        ("a: 1\n---\nb: 2", "yaml-documents"),
        ("%YAML 1.1\n---\na: no", "yaml-directive"),
        ("# x\n%YAML 1.3\n---\na: no", "yaml-directive"),
        ("a: 1\n...\n%TAG ! x\n---\nb: 1", "yaml-directive"),
        ("? [a]\n: 1", "yaml-key"),
        ('a: "\\UFFFFFFFF"', "yaml-syntax"),
        ("a: \x1b[0m", "control-character"),
    ],
)
def test_what_could_surprise_is_refused(text: str, code: str) -> None:
    assert problem_code(text) == code


def test_a_duplicate_key_names_both_lines() -> None:
    _, (problem,) = read_yaml("a: 1\nb: 2\na: 3", "soup.yaml")
    assert problem.message == "`a` is given twice: lines 1 and 3"
    assert problem.where == "soup.yaml:3"


def test_keys_are_text_whatever_they_look_like() -> None:
    root, _ = read_yaml("1: a\ntrue: b\nnull: c\n1.0: d", "soup.yaml")
    assert root is not None
    assert list(root.plain()) == ["1", "true", "null", "1.0"]


SIZE = 250_000


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000,
        "[" * SIZE,
        "{a: " * 3000,
        "- " * 3000,
        "\n".join(" " * depth + "a:" for depth in range(700)),
        "a: 1\n" * (SIZE // 5),
        "".join(f"k{index}: 1\n" for index in range(25_000)),
        "a: [" + "x, " * (SIZE // 3) + "]",
        "a: " + "x" * SIZE,
        "x" * SIZE + ": 1",
        '"' + "x" * SIZE,
        "a: |\n" + "  x\n" * (SIZE // 4),
        "#" * SIZE,
        "\n" * SIZE,
        "a: " + "9" * SIZE,
        "a: " + "[" * 31 + "]" * 31,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_hostile_text_is_answered_within_a_second_of_work(text: str) -> None:
    with _untraced(), pytest.raises(SoupError):
        began = time.process_time()
        try:
            parse_config(text, "soup.yaml")
        finally:
            seconds = time.process_time() - began
    # Processor time, so that a busy machine does not matter.
    assert seconds < 1.5


@contextmanager
def _untraced() -> Iterator[None]:
    """Without the hook that counts covered lines, which takes several times as long as the lines."""
    hook = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(hook)


_PIECES = """base: x~data:~  train: a~training:~  lr: 1~ lora: {r: 8~}~- a~? b~: c~  <<: *x~&a~!t~'~"~\t~  ~#
---~...~%TAG~a: [~]~a: |"""
_LINES = st.lists(st.sampled_from(_PIECES.replace("\n", "~").split("~")), max_size=12).map("\n".join)


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=80) | st.text("abc:-[]{}&*!|>'\"%@`#?,\n \t\\0x1.", max_size=60) | _LINES)
@example("a: -_")
@example("\ufeffbase: x")
@example('"\\UFFFFFFFF": 1')
@example("? ")
@example("base: x\ndata: {train: x}\ntraining: {lora: {rank_pattern: {? a : 1}}}")
def test_no_text_does_anything_but_load_or_be_refused(text: str) -> None:
    try:
        parse_config(text, "soup.yaml")
    except SoupError as error:
        assert error.exit_code == 2
        assert all(problem.render() and problem.code for problem in error.problems)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_no_override_does_anything_but_load_or_be_refused(text: str) -> None:
    for override in (text, f"training.lr={text}", f"{text}=1", f"training.lora.rank_pattern={text}"):
        try:
            parse_config("base: x\ndata: {train: y}", "soup.yaml", [override])
        except SoupError as error:
            assert error.exit_code == 2
