"""Text from elsewhere made fit for a terminal, a log and a page: printable, short, without access tokens."""

from __future__ import annotations

import re
from pathlib import Path

LONGEST = 2000
# Hugging Face, OpenAI and its like, GitHub, Slack, AWS, Google. The keys of services are runs of letters and
# digits; a folder called `hf_smollm_tuned` is none.
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])"
    r"(?:hf_|api_org_|sk-|sk_|gsk_|pk_|gh[opsur]_|github_pat_|glpat-|xox[abeprs]-|AKIA|ASIA|AIza|ya29\.|Bearer )"
    # Bounded, so that a long text of prefixes takes no longer than any other.
    r"[\w.-]{0,40}?[A-Za-z0-9]{16,}[\w.-]*"
)
MASK = "…"


def masked(text: str) -> str:
    """The text with a mark in place of everything that looks like an access token.

    >>> masked("no access with hf_abcdefghijklmnopqrstuvwxyzabcdefgh"), masked("./hf_smollm_tuned/sk-model")
    ('no access with …', './hf_smollm_tuned/sk-model')
    """
    return _TOKENS.sub(MASK, text)


def mask_file(file: Path) -> None:
    """Mask the tokens in a text file that a run copies from somebody's folder; without one it stays as it is."""
    text = file.read_text("utf-8")
    if holds_token(text):
        file.write_text(masked(text), "utf-8")


def holds_token(text: str) -> bool:
    """Whether something in the text looks like an access token."""
    return _TOKENS.search(text) is not None


def printable(text: str) -> str:
    r"""The text with escapes in place of what would steer a terminal or cannot be written as UTF-8.

    >>> print(printable("red \x1b[31m\n"))
    red \u001b[31m\u000a
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def legible(text: str) -> str:
    """One line of at most 2,000 characters, printable and without access tokens."""
    # Masked before it is cut: half a token would no longer look like one.
    text = masked(text[: 2 * LONGEST])
    return printable(text if len(text) <= LONGEST else text[: LONGEST - 1] + MASK)


def _escape(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
