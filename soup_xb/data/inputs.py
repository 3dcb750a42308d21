"""What a model takes besides tokens: made by its processor from files, for the rows of one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from attrs import frozen

from soup_xb.core.disk import foreign_errors
from soup_xb.core.errors import DataError, ModelError
from soup_xb.core.rows.examples import Array, Inputs, MediaFile, RowMedia
from soup_xb.data.images import read_image
from soup_xb.data.media_files import unusable
from soup_xb.data.sounds import read_sound
from soup_xb.data.spans import Span

# What a processor makes of the text; the tokens are ours.
_TEXT = ("input_ids", "attention_mask", "text_replacement_offsets", "labels")
# One number a token, which says where files stand among the words.
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
# What the first dimension of an input counts: all files, the rows that have some, or the patches of image_grid_thw.
_COUNTED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "pixel_values": ("files", "rows", "patches"),
        "pixel_attention_mask": ("files", "rows"),
        "image_sizes": ("files",),
        "image_grid_thw": ("files",),
        "image_position_ids": ("files",),
        "input_features": ("files",),
        "input_features_mask": ("files",),
        "feature_attention_mask": ("files",),
    }
)


@frozen
class Expanded:
    """A text in which each mark has become the tokens of its file: `count` of them in all.

    `replaced` are the spans of the marks in the old text and of their tokens in the new one, in order.
    """

    text: str
    count: int
    replaced: tuple[tuple[Span, Span], ...]


@frozen(eq=False)
class InputMaker:
    """A processor with what is known about it.

    `kind` is image or audio, `mark` the text that stands for a file in a rendered conversation (empty for a base that
    has none), `ids` the ids of all tokens that stand for files.
    """

    processor: Any
    base: Path
    kind: str
    mark: str
    ids: tuple[int, ...]

    @classmethod
    def of(cls, processor: Any, base: Path, kind: str) -> InputMaker:
        """Raises ModelError for a processor that has no part for this kind of file."""
        part = "image_processor" if kind == "image" else "feature_extractor"
        if getattr(processor, part, None) is None:
            raise ModelError(
                "no-processor",
                f"the base's processor ({type(processor).__name__}) takes no {kind} files",
                where=str(base),
                help=f"take a base that {'sees' if kind == 'image' else 'hears'}.",
            )
        ids = [getattr(processor, f"{one}_token_id", None) for one in ("image", "video", "audio")]
        known = tuple(int(one) for one in ids if one is not None)
        return cls(processor, base, kind, getattr(processor, f"{kind}_token", None) or "", known)

    def expand(self, media: RowMedia) -> Expanded:
        """Open a row's files and learn how many tokens each becomes.

        Raises DataError for a file that is broken, and ModelError for a processor whose inputs are not known here.
        """
        if not self.mark:
            raise ModelError(
                "no-media-mark",
                f"{type(self.processor).__name__} has no token that stands for {self.kind} files in a conversation",
                where=str(self.base),
                help="take a base whose processor has one.",
            )
        found = self._processed([media], return_text_replacement_offsets=True)
        self._counted([media], found)
        offsets = found.get("text_replacement_offsets")
        if not offsets:
            raise ModelError(
                "no-media-mark",
                f"{type(self.processor).__name__} does not tell what it makes of `{self.mark}`",
                where=str(self.base),
                help="take a base of another type; a newer transformers may tell.",
            )
        pieces, end, replaced = [], 0, []
        for one in offsets[0]:
            start, stop = one["span"]
            pieces += [media.text[end:start], one["replacement"]]
            replaced.append(((start, stop), tuple(one["new_span"])))
            end = stop
        count = int(np.isin(np.asarray(found["input_ids"][0]), self.ids).sum())
        return Expanded("".join([*pieces, media.text[end:]]), count, tuple(replaced))

    def look_at(self, media: RowMedia) -> None:
        """Open a row's files, and see that the base can take them."""
        self._counted([media], self._processed([media]))

    def inputs(self, media: Sequence[RowMedia], tokens: Array) -> Inputs:
        """The model's inputs for rows together with the grid of their tokens, int32 (rows, length)."""
        found = self._processed(media)
        arrays = self._counted(media, found)
        types = {name for name in _TOKEN_TYPES if name in found}
        if types:
            marked = self.processor.create_mm_token_type_ids(tokens.tolist())
            arrays |= dict.fromkeys(types, np.asarray(marked, dtype=np.int64))
        return arrays

    def _processed(self, media: Sequence[RowMedia], **more: Any) -> Mapping[str, Any]:
        opened = [[self._opened(file, row.where) for file in row.files] for row in media]
        where = media[0].where if len(media) == 1 else ", ".join(row.where for row in media)
        with foreign_errors(partial(_refused, where)):
            if self.kind == "image":
                arguments: dict[str, Any] = {"images": opened}
            else:
                rate = self.processor.feature_extractor.sampling_rate
                arguments = {"audio": [sound for row in opened for sound in row], "sampling_rate": rate}
            if self.mark:
                texts = [row.text for row in media]
                arguments |= {"text": texts, "padding": True, "add_special_tokens": False, **more}
            result: Mapping[str, Any] = self.processor(return_tensors="np", **arguments)
        return result

    def _opened(self, file: MediaFile, where: str) -> Any:
        if self.kind == "image":
            return read_image(file, where)
        extractor = self.processor.feature_extractor
        sound = read_sound(file, where, extractor.sampling_rate)
        most = getattr(extractor, "n_samples", None)
        if most is not None and len(sound.samples) > most:
            message = (
                f"lasts {sound.seconds:.1f} seconds, and this base hears {most / sound.rate:.0f} at a time"
            )
            raise unusable(file, where, message, "cut it into pieces, each with its own words.")
        return sound.samples

    def _counted(self, media: Sequence[RowMedia], found: Mapping[str, Any]) -> dict[str, Array]:
        """The arrays of files, the first dimension of each as it should be. Raises ModelError naming the input."""
        names = [name for name in found if name not in (*_TEXT, *_TOKEN_TYPES)]
        unknown = [name for name in names if name not in _COUNTED]
        types = [name for name in _TOKEN_TYPES if name in found]
        if types and not self.processor.return_mm_token_type_ids:
            unknown += types
        if unknown:
            raise self._unknown(f"gives the model `{unknown[0]}`, which is not known here")
        arrays = {name: np.asarray(found[name]) for name in names}
        counts = {"files": sum(len(row.files) for row in media), "rows": len(media)}
        if "image_grid_thw" in arrays:
            counts["patches"] = int(arrays["image_grid_thw"].prod(axis=1).sum())
        for name, array in arrays.items():
            meant = [counts[what] for what in _COUNTED[name] if what in counts]
            if array.shape[:1] not in [(count,) for count in meant]:
                shape = " x ".join(map(str, array.shape))
                raise self._unknown(f"gives `{name}` of {shape} for {_told(counts)}, which is not known here")
        return arrays

    def _unknown(self, message: str) -> ModelError:
        return ModelError(
            "unknown-model-input",
            f"{type(self.processor).__name__} {message}",
            where=str(self.base),
            help="take a base of a type that docs/vision-audio.md lists.",
        )


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def _refused(where: str, reason: str) -> DataError:
    return DataError(
        "processor-refuses",
        f"the base's processor refuses its files: {reason}",
        where=where,
        help="`soupx data FILE --base BASE --task TASK` looks at every row by itself.",
    )
