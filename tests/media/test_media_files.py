"""Files that rows name: found inside the data file's folder, whole, and of a kind that is read."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_bases import save_picture, save_tone

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import Attachment, Source
from soup_xb.data.media_inputs import Sound, find_files, read_image, read_sound


def found(folder: Path, name: str, kind: str = "image") -> Any:
    (folder / "rows.jsonl").touch()
    (file,) = find_files([Attachment(kind, name)], Source(str(folder / "rows.jsonl"), 3))
    return file


def refused(folder: Path, name: str, kind: str = "image", rate: int = 16000) -> tuple[str, str]:
    with pytest.raises(DataError) as error:
        file = found(folder, name, kind)
        read_image(file, "rows.jsonl:3") if kind == "image" else read_sound(file, "rows.jsonl:3", rate)
    (problem,) = error.value.problems
    assert "rows.jsonl:3" in problem.where
    return problem.code, f"{problem.message} {problem.help}"


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/hostname", "img/../../secret.png", "a\\b.png", "link.png"]
)
def test_a_name_that_leaves_the_data_files_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    save_picture(tmp_path / "secret.png", (1, 2, 3))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert refused(folder, name)[0] == "media-outside"


def test_a_missing_picture_is_told_with_the_row_and_a_close_name(tmp_path: Path) -> None:
    save_picture(tmp_path / "img" / "cat.png", (1, 2, 3))
    code, text = refused(tmp_path, "img/cot.png")
    assert code == "missing-file"
    assert "img/cot.png" in text
    assert "cat.png" in text


@pytest.mark.parametrize("content", [b"", b"not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a"])
def test_what_is_no_picture_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert refused(tmp_path, "a.png")[0] == "broken-file"


def test_a_cut_off_picture_is_refused(tmp_path: Path) -> None:
    file = save_picture(tmp_path / "a.png", (1, 2, 3), (64, 64))
    file.write_bytes(file.read_bytes()[:-30])
    assert "damaged" in refused(tmp_path, "a.png")[1]


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_a_picture_that_unpacks_to_billions_of_pixels_is_refused_unread(side: int, tmp_path: Path) -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)
    assert "at most 67,108,864 pixels" in refused(tmp_path, "a.png")[1]


def test_a_picture_that_changes_after_it_was_found_is_refused(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", (1, 2, 3))
    file = found(tmp_path, "a.png")
    save_picture(tmp_path / "a.png", (3, 2, 1))
    with pytest.raises(DataError, match="is not the file that it was"):
        read_image(file, "rows.jsonl:3")


def wav(samples: bytes, kind: int, bits: int, channels: int = 1) -> bytes:
    frame = channels * bits // 8
    layout = struct.pack("<HHIIHH", kind, channels, 16000, 16000 * frame, frame, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + layout + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("kind", "bits", "samples"),
    [
        (1, 8, bytes([128, 192, 64])),
        (1, 16, struct.pack("<3h", 0, 16384, -16384)),
        (1, 24, b"\0\0\0" + b"\0\0\x40" + b"\0\0\xc0"),
        (1, 32, struct.pack("<3i", 0, 2**30, -(2**30))),
        (3, 32, struct.pack("<3f", 0, 0.5, -0.5)),
        (3, 64, struct.pack("<3d", 0, 0.5, -0.5)),
    ],
)
def test_integers_and_floats_of_every_width_are_the_same_sound(
    kind: int, bits: int, samples: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.wav").write_bytes(wav(samples, kind, bits))
    sound: Sound = read_sound(found(tmp_path, "a.wav", "audio"), "rows.jsonl:3", 16000)
    np.testing.assert_allclose(sound.samples, [0, 0.5, -0.5])


def test_channels_are_averaged(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(struct.pack("<4h", 16384, 0, -16384, -16384), 1, 16, channels=2))
    sound = read_sound(found(tmp_path, "a.wav", "audio"), "rows.jsonl:3", 16000)
    np.testing.assert_allclose(sound.samples, [0.25, -0.5])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"ID3 an mp3",
        wav(b"", 1, 16),
        wav(b"\0\0\0\0", 1, 16)[:-2],
        wav(b"\0\0", 2, 4),
        wav(struct.pack("<f", float("nan")), 3, 32),
    ],
)
def test_what_is_no_whole_wav_file_is_refused_with_a_way_to_convert_it(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    code, text = refused(tmp_path, "a.wav", "audio")
    assert code == "broken-file"
    assert "ffmpeg -i a.wav -ac 1 -ar 16000" in text


def test_another_rate_is_refused_naming_the_one_that_is_heard(tmp_path: Path) -> None:
    save_tone(tmp_path / "a.wav", 440, rate=8000)
    assert "8,000 samples a second, and this base hears 16,000" in refused(tmp_path, "a.wav", "audio")[1]
