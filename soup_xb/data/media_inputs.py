"""A base's processor, and the pictures and sounds that it takes: found beside the data file, and read.

A row's file lies in the folder of its data file, never outside of it. A picture becomes a PIL image in RGB; a sound the
samples of a WAV file at the rate of the base's feature extractor. The processor is transformers' own, opened without
its video part and with pictures on PIL.
"""

from __future__ import annotations

import hashlib
import io
import stat
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import frozen

from soup_xb.core.base.folder import read_object
from soup_xb.core.disk import foreign_errors
from soup_xb.core.errors import DataError, ModelError
from soup_xb.core.rows.examples import Array, Attachment, MediaFile, Source
from soup_xb.core.text import bytes_text, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image


# In the order in which AutoProcessor asks them for the processor's class.
CONFIG_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def open_processor(base: Path) -> Any:
    """The processor in a local folder. No code in the folder is run and nothing is fetched.

    A video processor is left out: rows hold no videos, and it insists on torchvision. Raises ModelError for a folder
    without a processor, a class that transformers does not have, and a part that cannot be opened.
    """
    kind = _processor_class(base)
    with foreign_errors(partial(_unusable, base)):
        parts = [_part(base, name) for name in kind.get_attributes()]
        settings, _ = kind.get_processor_dict(str(base), local_files_only=True)
        return _without_video(kind).from_args_and_dict(parts, settings)


def is_processor_folder(folder: Path) -> bool:
    """Whether a folder holds a processor's settings, as that of an adapter for pictures or sounds does."""
    return any((folder / name).is_file() for name in CONFIG_FILES[:2])


def task_of_processor(base: Path) -> str:
    """The task whose files the base's processor takes: vision where it sees, else audio."""
    return "vision" if "image_processor" in _processor_class(base).get_attributes() else "audio"


def _processor_class(base: Path) -> Any:
    import transformers
    from transformers import PROCESSOR_MAPPING, AutoConfig, ProcessorMixin

    named = [_settings(base / name).get("processor_class") for name in CONFIG_FILES]
    name = next((one for one in named if isinstance(one, str)), "")
    kind = getattr(transformers, name, None) if name else None
    if kind is None:
        with foreign_errors(partial(_unusable, base)):
            config = AutoConfig.from_pretrained(str(base), trust_remote_code=False, local_files_only=True)
        kind = PROCESSOR_MAPPING.get(type(config), None)
    if not isinstance(kind, type) or not issubclass(kind, ProcessorMixin):
        told = f"`{name[:80]}`, which transformers does not have" if name else "none in it"
        raise ModelError(
            "no-processor",
            f"the base needs a processor, and there is {told}",
            where=str(base),
            help="take a base that has a processor_config.json or preprocessor_config.json of a class in transformers.",
        )
    if "audio_tokenizer" in _settings(base / CONFIG_FILES[0]):
        raise ModelError(
            "no-processor",
            "its processor wants a second model for its sounds (`audio_tokenizer`), which is not opened here",
            where=str(base / CONFIG_FILES[0]),
            help="take a base that hears by itself.",
        )
    return kind


def _settings(file: Path) -> Mapping[str, Any]:
    return read_object(file, "base-config") if file.is_file() else {}


def _part(base: Path, name: str) -> Any:
    """The processor's part of this name (tokenizer, image_processor, feature_extractor), None for videos."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    folder = str(base)
    if name == "tokenizer":
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if name == "image_processor":
        # PIL and torchvision scale a picture to slightly other pixels; one of them is on every machine.
        return AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
    if name == "feature_extractor":
        return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if name == "video_processor":
        return None
    raise ModelError(
        "no-processor",
        f"its processor has a part that is not known here: `{name}`",
        where=str(base),
        help="take a base whose processor holds a tokenizer with an image processor or a feature extractor.",
    )


def _without_video(kind: Any) -> Any:
    """The class with an empty place for a video processor, which its own check would not let pass."""

    def check(self: Any, name: str, part: Any) -> Any:
        if name == "video_processor" and part is None:
            return None
        return kind.check_argument_for_proper_class(self, name, part)

    members = {"check_argument_for_proper_class": check, "__init__": kind.__init__}
    return type(kind.__name__, (kind,), members)


def _unusable(base: Path, reason: str) -> ModelError:
    if "orchvision" in reason:
        return ModelError(
            "processor-needs-torchvision",
            "its processor scales pictures with torchvision alone",
            where=str(base),
            help="install the torchvision that fits your torch: `pip install torchvision`.",
        )
    return ModelError(
        "broken-processor",
        f"the processor cannot be opened: {reason}",
        where=str(base),
        help="download the base's processor files (processor_config.json, preprocessor_config.json) again.",
    )


# A picture or half a minute of sound is a hundredth of it.
LARGEST_FILE = 256 * 2**20
_MOST_NEIGHBOURS = 1000


def find_files(attachments: Sequence[Attachment], source: Source) -> tuple[MediaFile, ...]:
    """The files that a row names, each with its bytes' sha256.

    Raises DataError naming row and file for a name that leaves the data file's folder, links followed, and for what is
    missing, no ordinary file, too large or not readable.
    """
    root = Path(source.file).parent
    if not Path(source.file).is_file():
        raise DataError(
            "media-of-hub-rows",
            "names files, and the rows come from no file of this machine that they could lie beside",
            where=str(source),
            help="save the dataset as a .jsonl file with its pictures or sounds beside it, and name that file.",
        )
    return tuple(_found(attachment, root, str(source)) for attachment in attachments)


def read_file(file: MediaFile, where: str) -> bytes:
    """The bytes of a file that was found. Raises DataError where it is not the file of then any more."""
    try:
        content = file.path.read_bytes()
    except OSError as error:
        raise unusable(file, where, f"cannot be read any more: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise unusable(file, where, "is not the file that it was when the run began")
    return content


def unusable(file: MediaFile | Attachment, where: str, message: str, help: str = "") -> DataError:
    """The error of a picture or sound, naming it and the row."""
    return DataError("broken-file", f"`{file.name[:200]}` {message}", where=where, help=help)


def _found(attachment: Attachment, root: Path, where: str) -> MediaFile:
    path = _inside(attachment, root, where)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise unusable(attachment, where, "is not an ordinary file")
        if found.st_size > LARGEST_FILE:
            raise unusable(attachment, where, f"is larger than {bytes_text(LARGEST_FILE)}")
        content = path.read_bytes()
    except OSError as error:
        raise unusable(attachment, where, f"cannot be read: {error.strerror}") from error
    return MediaFile(attachment.kind, attachment.name, path, hashlib.sha256(content).hexdigest())


def _inside(attachment: Attachment, root: Path, where: str) -> Path:
    name = attachment.name
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise _outside(attachment, where, "is not a path inside the data file's folder")
    try:
        base = root.resolve(strict=True)
        path = base.joinpath(*pure.parts).resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        help = did_you_mean(pure.name, _neighbours(root / pure.parent))
        folder = str(root) if str(root) != "." else "the data file's folder"
        raise DataError(
            "missing-file",
            f"`{name[:200]}` is not there",
            where=where,
            help=help or f"paths are relative to {folder}.",
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise _outside(attachment, where, "leads nowhere") from error
    if base not in path.parents:
        raise _outside(attachment, where, "is a link that leads out of the data file's folder")
    return path


def _outside(attachment: Attachment, where: str, message: str) -> DataError:
    help = "put it beside the data file, or in a folder there, and write the path from there."
    return DataError("media-outside", f"`{attachment.name[:200]}` {message}", where=where, help=help)


def _neighbours(folder: Path) -> list[str]:
    try:
        return [entry.name for entry, _ in zip(folder.iterdir(), range(_MOST_NEIGHBOURS), strict=False)]
    except OSError:
        return []


# Formats of one still picture. PIL knows many more, some of which start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# Three bytes each when unpacked: a small file can hold billions of them.
MOST_PIXELS = 2**26


def read_image(file: MediaFile, where: str) -> Image:
    """The picture, upright and in RGB. `where` names the row.

    Raises DataError for what is no picture, is damaged, or has more than 67 million pixels, told before it is unpacked.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    content = read_file(file, where)
    with warnings.catch_warnings():
        # PIL's own limits only warn below twice their value.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > MOST_PIXELS:
                    raise unusable(file, where, f"has {width:,} x {height:,} pixels", _SMALLER)
                return ImageOps.exif_transpose(opened).convert("RGB")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise unusable(file, where, "unpacks to far more than a picture holds", _SMALLER) from error
        except UnidentifiedImageError as error:
            help = f"pictures are {', '.join(FORMATS[:-1])} or {FORMATS[-1]} files."
            raise unusable(file, where, "is no picture", help) from error
        except (OSError, SyntaxError, ValueError, EOFError, OverflowError) as error:
            raise unusable(file, where, f"is damaged: {error}") from error


_SMALLER = f"scale it down: at most {MOST_PIXELS:,} pixels; a model sees a fraction of that."


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
