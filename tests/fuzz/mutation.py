"""Damage as people, editors, disks and attackers do it: strategies for hypothesis that spoil a text a little."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import settings
from hypothesis import strategies as st

# `make test` takes a sample, the same each time; `make torture` takes what hypothesis finds.
SAMPLE = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def full(count: int) -> settings:
    """All of it, for a test marked `torture`."""
    return settings(max_examples=count, deadline=None, database=None)


Edit = Callable[[str, str, int, int], str]


def _lines(change: Callable[[list[str], int, int], list[str]]) -> Edit:
    """An edit of whole lines, at two of them."""

    def edit(text: str, piece: str, first: int, second: int) -> str:
        lines = text.split("\n")
        return "\n".join(change(lines, first % len(lines), second % len(lines)))

    return edit


def _swapped(lines: list[str], first: int, second: int) -> list[str]:
    lines[first], lines[second] = lines[second], lines[first]
    return lines


def _indented(lines: list[str], first: int, second: int) -> list[str]:
    lines[first] = " " * (second % 5) + lines[first].lstrip(" ")
    return lines


def _replaced(text: str, piece: str, first: int, second: int) -> str:
    start = first % (len(text) + 1)
    return text[:start] + piece + text[start + second % 12 :]


EDITS: tuple[Edit, ...] = (
    _lines(lambda lines, first, _: lines[:first] + lines[first + 1 :]),
    _lines(lambda lines, first, second: lines[:second] + lines[first : first + 1] + lines[second:]),
    _lines(_swapped),
    _lines(_indented),
    _replaced,
    _replaced,
    lambda text, _piece, first, _second: text[: first % (len(text) + 1)],
    lambda text, _piece, first, second: text[first % (len(text) + 1) :][: second + 1],
    lambda text, piece, first, second: text + piece * (second % 50),
    lambda text, piece, first, _second: text.replace(text[first % max(1, len(text)) :][:1] or " ", piece, 3),
)


@st.composite
def spoiled(draw: st.DrawFn, seeds: Sequence[str], pieces: Sequence[str]) -> str:
    """One of the seeds after up to four edits with some of the pieces."""
    text = draw(st.sampled_from(seeds))
    places = st.integers(0, 5000)
    for _ in range(draw(st.sampled_from((0, 1, 1, 1, 2, 2, 3, 4)))):
        edit = draw(st.sampled_from(EDITS))
        piece = draw(st.sampled_from(pieces) | st.text(max_size=6))
        text = edit(text, piece, draw(places), draw(places))
    return text
