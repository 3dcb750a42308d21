"""Text for people: foreign text made printable, numbers with units, and close names for one that does not exist."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
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


def bytes_text(count: int) -> str:
    """Bytes in the unit that fits.

    >>> bytes_text(512), bytes_text(3_400_000)
    ('512 B', '3.2 MiB')
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def duration_text(seconds: float) -> str:
    """A duration in its two largest units.

    >>> duration_text(3.24), duration_text(130), duration_text(7_500), duration_text(190_000)
    ('3.2s', '2m10s', '2h05m', '2d04h')
    """
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest}s"
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 24 else f"{hours // 24}d{hours % 24:02d}h"


def rate_text(rate: float) -> str:
    """A learning rate, short.

    >>> rate_text(1.8e-4), rate_text(0.0)
    ('1.8e-4', '0')
    """
    if rate == 0:
        return "0"
    digits, _, exponent = f"{rate:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def count_text(count: int) -> str:
    """A count in full below ten thousand, in thousands, millions or billions above.

    >>> count_text(2_304), count_text(921_600), count_text(4_884_480)
    ('2,304', '921.6 K', '4.88 M')
    """
    if count < 10_000:
        return f"{count:,}"
    for limit, size, text in ((10**6, 10**3, "{:.1f} K"), (10**9, 10**6, "{:.2f} M")):
        if count < limit:
            return text.format(count / size)
    return f"{count / 10**9:.2f} B"


def close_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names nearest to `name`, best first.

    >>> close_names("learing_rate", ["lr", "learning_rate", "epochs"])
    ['learning_rate']
    """
    return get_close_matches(name, list(known), n=count, cutoff=0.6)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question to put under an error, empty where nothing is close.

    >>> did_you_mean("pizza", ["random", "pissa", "olora"])
    'did you mean `pissa`?'
    """
    close = close_names(name, known)
    return f"did you mean {' or '.join(f'`{candidate}`' for candidate in close)}?" if close else ""
