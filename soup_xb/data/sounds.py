"""Sounds: the samples of a WAV file, at the rate that a base's feature extractor hears."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from attrs import frozen

from soup_xb.core.rows.examples import Array, MediaFile
from soup_xb.data.media_files import read_file, unusable

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_MOST_CHANNELS = 32


class _WaveError(ValueError):
    """What is wrong with a file, in words that follow its name."""


@frozen(eq=False)
class Sound:
    """Samples, float32 (length,) between -1 and 1, channels averaged; `rate` in samples a second."""

    samples: Array
    rate: int

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.samples) / self.rate


def read_sound(file: MediaFile, where: str, rate: int) -> Sound:
    """The sound. `where` names the row.

    Raises DataError for what is no WAV file of integers or floats, is damaged or empty, and where its rate is not
    `rate`: resampling changes what is heard, and is left to a tool made for it.
    """
    try:
        sound = _parsed(read_file(file, where))
    except _WaveError as error:
        raise unusable(file, where, str(error), _convert(file, rate)) from error
    if sound.rate != rate:
        message = f"has {sound.rate:,} samples a second, and this base hears {rate:,}"
        raise unusable(file, where, message, _convert(file, rate))
    return sound


def _convert(file: MediaFile, rate: int) -> str:
    return f"write it anew, with `ffmpeg -i {file.name} -ac 1 -ar {rate} -c:a pcm_s16le NEW.wav` for example."


def _parsed(content: bytes) -> Sound:
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise _WaveError("is no WAV file")
    layout: tuple[int, int, int, int] | None = None
    for name, body in _chunks(content):
        if name == b"fmt ":
            layout = _layout(body)
        elif name == b"data":
            if layout is None:
                raise _WaveError("is damaged: its samples come before their format")
            return _sound(body, layout)
    raise _WaveError("is damaged: it holds no samples")


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 12
    while place + 8 <= len(content):
        name, size = content[place : place + 4], struct.unpack_from("<I", content, place + 4)[0]
        body = content[place + 8 : place + 8 + size]
        if len(body) < size:
            raise _WaveError(
                f"is cut off: {len(body):,} of {size:,} bytes of `{name.decode('latin-1').strip()}`"
            )
        yield name, body
        # Chunks begin at even places.
        place += 8 + size + size % 2


def _layout(body: bytes) -> tuple[int, int, int, int]:
    """Kind of number, channels, samples a second, bits of a sample."""
    if len(body) < 16:
        raise _WaveError("is damaged: its format is cut off")
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
    if kind == _EXTENSIBLE and len(body) >= 26:
        kind = struct.unpack_from("<H", body, 24)[0]
    if (kind, bits) not in ((_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)):
        raise _WaveError(f"holds samples of an unknown kind (format {kind}, {bits} bits)")
    if not 0 < channels <= _MOST_CHANNELS or not rate:
        raise _WaveError(f"is damaged: {channels} channels, {rate} samples a second")
    return kind, channels, rate, bits


def _sound(body: bytes, layout: tuple[int, int, int, int]) -> Sound:
    kind, channels, rate, bits = layout
    frame = channels * bits // 8
    body = body[: len(body) // frame * frame]
    if not body:
        raise _WaveError("holds no samples")
    samples = _numbers(body, kind, bits).reshape(-1, channels).mean(axis=1, dtype=np.float64)
    if not np.isfinite(samples).all():
        raise _WaveError("is damaged: it holds samples that are not finite")
    return Sound(samples.astype(np.float32), rate)


def _numbers(body: bytes, kind: int, bits: int) -> Array:
    if kind == _FLOAT:
        return np.frombuffer(body, dtype=f"<f{bits // 8}")
    if bits == 8:
        # The one width without a sign.
        return (np.frombuffer(body, dtype=np.uint8).astype(np.float32) - 128) / 128
    if bits == 24:
        wide = np.zeros((len(body) // 3, 4), dtype=np.uint8)
        wide[:, 1:] = np.frombuffer(body, dtype=np.uint8).reshape(-1, 3)
        return wide.reshape(-1).view("<i4").astype(np.float64) / 2**31
    whole: Array = np.frombuffer(body, dtype=f"<i{bits // 8}").astype(np.float64) / 2 ** (bits - 1)
    return whole
