"""The mechanical judge of the demo: does an answer have the format that the dataset teaches."""

from __future__ import annotations

import re
from collections.abc import Iterable

LABELS = ("In short", "Because", "Try this")
_ANSWER = re.compile("\n".join(rf"{label}: (\S.*\S)" for label in LABELS))
_SENTENCE_END = (".", "!", "?", '"')


def passes(answer: str) -> bool:
    r"""Whether the answer is three labelled lines and nothing else, each a different whole sentence.

    >>> passes("In short: Ice floats.\nBecause: It is less dense.\nTry this: Freeze a full bottle.")
    True
    >>> passes("Ice floats because it is less dense.")
    False
    """
    match = _ANSWER.fullmatch(answer.strip())
    if match is None:
        return False
    sentences = match.groups()
    whole = all(len(text.split()) > 1 and text.endswith(_SENTENCE_END) for text in sentences)
    return whole and len(set(sentences)) == len(LABELS)


def score(answers: Iterable[str]) -> int:
    """How many of the answers have the format."""
    return sum(passes(answer) for answer in answers)
