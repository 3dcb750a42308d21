"""Numbers as people read them: bytes, durations, counts, learning rates."""

from __future__ import annotations


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
