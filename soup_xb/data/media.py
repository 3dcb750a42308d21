"""Rows with pictures or sounds -> token rows, and the files of a micro-batch -> the model's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from attrs import evolve, field, fields, frozen

from soup_xb.core.adapter.extras import write_media_kind
from soup_xb.core.disk import foreign_errors
from soup_xb.core.errors import DataError, ModelError
from soup_xb.core.rows.examples import (
    Array,
    ChatExample,
    Example,
    Inputs,
    MediaFile,
    Message,
    RowMedia,
)
from soup_xb.core.rows.row import Row
from soup_xb.data.media_inputs import find_files, open_processor, read_image, read_sound, unusable
from soup_xb.data.model_files import copy_processor
from soup_xb.data.spans import Markup, Span
from soup_xb.data.tokenizer import ChatTokenizer, Tokenized, open_tokenizer


@frozen
class MediaMarkup(Markup):
    """A text in which every mark has become the tokens of its file. `count` is how many such tokens there are."""

    media: RowMedia | None = None
    count: int = 0


@frozen(eq=False)
class MediaTokenizer(ChatTokenizer):
    """A chat tokenizer whose conversations hold pictures or sounds. Made by `open_media_tokenizer`."""

    maker: InputMaker = field(kw_only=True)

    @property
    def reads_files(self) -> bool:
        """They do."""
        return True

    def save(self, folder: Path, pad_token: str = "") -> None:
        """Write the tokenizer's files, the processor's settings as the base has them, and the kind of the files."""
        super().save(folder, pad_token)
        write_media_kind(folder, self.maker.kind)
        copy_processor(self.base, folder, self.new_template)

    def _markup(self, example: Example) -> Markup:
        markup = super()._markup(_as_conversation(example))
        if not example.attachments or not markup.spans:
            return markup
        where = str(example.source)
        files = find_files(example.attachments, example.source)
        media = RowMedia(files, markup.text, where, self.maker.inputs)
        self._check_marks(markup.text, len(files), where)
        expanded = self.maker.expand(media)
        spans, literals = (
            tuple(_moved(span, expanded.replaced) for span in places)
            for places in (markup.spans, markup.literals)
        )
        return MediaMarkup(
            expanded.text,
            spans,
            markup.rewritten,
            markup.hidden,
            literals=literals,
            spelled=markup.spelled,
            forged=markup.forged,
            where=where,
            weights=markup.weights,
            reshaped=markup.reshaped,
            media=media,
            count=expanded.count,
        )

    def _check_marks(self, text: str, files: int, where: str) -> None:
        found = text.count(self.maker.mark)
        if found != files:
            raise DataError(
                "file-marks",
                f"the chat template writes {found} marks `{self.maker.mark}` for {files} files",
                where=where,
                help="a text that holds the mark itself cannot be told from a file; a template that writes none is "
                "made for text alone: give another as `data.chat_template`.",
            )

    def _tokenized(
        self, example: Example, markup: Markup, encoded: tuple[Array, Array], max_length: int
    ) -> Tokenized:
        expected = markup.count if isinstance(markup, MediaMarkup) else 0
        ids = encoded[0]
        places = np.flatnonzero(np.isin(ids, self.maker.ids))
        if places.size != expected:
            raise DataError(
                "file-marks",
                f"{places.size} tokens stand for files and {expected} should",
                where=str(example.source),
                help=f"the text holds `{self.maker.mark}` itself: write it otherwise.",
            )
        # What stands for a file is read, never written.
        words = np.where(np.isin(ids, self.maker.ids), encoded[1].dtype.type(0), encoded[1])
        result = super()._tokenized(_as_conversation(example), markup, (ids, words), max_length)
        if places.size and places[-1] >= max_length:
            reason = f"its files alone reach beyond max_length ({places[-1] + 1:,} tokens)"
            return evolve(result, row=None, reason=reason)
        if isinstance(markup, MediaMarkup) and result.row is not None:
            [sequence] = result.row.sequences
            return evolve(result, row=Row("tokens", (evolve(sequence, media=markup.media),)))
        return result


@frozen(eq=False)
class TranscriptTokenizer(MediaTokenizer):
    """The tokenizer of a speech-to-text base (Whisper's shape): a row's tokens are what its decoder reads and writes.

    `longest` is the number of tokens that the decoder has places for.
    """

    longest: int = field(kw_only=True)

    def tokenize_many(self, examples: Sequence[Example], max_length: int) -> list[Tokenized]:
        """As in ChatTokenizer, rows no longer than the decoder."""
        return super().tokenize_many(examples, min(max_length, self.longest))

    def _markup(self, example: Example) -> Markup:
        if isinstance(example, ChatExample):
            raise DataError(
                "conversation-for-speech",
                "is a conversation, and this base writes down what it hears",
                where=str(example.source),
                help='write `{"audio": "FILE.wav", "text": "..."}`, or take an audio-text chat base.',
            )
        markup = ChatTokenizer._markup(self, example)
        if not markup.spans:
            return markup
        files = find_files(example.attachments, example.source)
        media = RowMedia(files, "", str(example.source), self.maker.inputs)
        self.maker.look_at(media)
        return MediaMarkup(markup.text, markup.spans, media=media)

    def _tokenized(
        self, example: Example, markup: Markup, encoded: tuple[Array, Array], max_length: int
    ) -> Tokenized:
        result = ChatTokenizer._tokenized(self, example, markup, encoded, max_length)
        if isinstance(markup, MediaMarkup) and result.row is not None:
            [sequence] = result.row.sequences
            return evolve(result, row=Row("tokens", (evolve(sequence, media=markup.media),)))
        return result

    def _start_of(self, example: Example) -> tuple[int, ...]:
        language = "" if isinstance(example, ChatExample) else example.language
        return _language_start(self, language, str(example.source)) if language else self.prefix


def open_tokenizer_for(media: str, base: Path, chat_template: str | None = None) -> ChatTokenizer:
    """The tokenizer in a local folder, with the base's processor where rows hold files of the kind `media`."""
    if media:
        return open_media_tokenizer(base, chat_template, media)
    return open_tokenizer(base, chat_template)


def open_media_tokenizer(base: Path, chat_template: str | None, media: str) -> MediaTokenizer:
    """The tokenizer and processor in a local folder, for rows with files of a kind, image or audio.

    Raises as `open_tokenizer` and `open_processor` do, and ModelError for a processor that reads no such files.
    """
    from transformers import AutoConfig

    processor = open_processor(base)
    plain = open_tokenizer(base, chat_template, processor)
    config = AutoConfig.from_pretrained(str(base), trust_remote_code=False, local_files_only=True)
    told = {one.name: getattr(plain, one.name) for one in fields(ChatTokenizer)}
    maker = InputMaker.of(processor, base, media)
    if not config.is_encoder_decoder:
        return MediaTokenizer(**told, maker=maker)
    start = config.decoder_start_token_id
    if start is not None and told["prefix"][:1] != (start,):
        told["prefix"] = (start, *told["prefix"])
    longest = getattr(config, "max_target_positions", None) or config.max_position_embeddings
    return TranscriptTokenizer(**told, maker=maker, longest=longest)


def _as_conversation(example: Example) -> Example:
    """A transcript as a conversation: a turn that is the sound alone, answered by its words."""
    if isinstance(example, ChatExample):
        return example
    turns = (Message("user", "", parts=example.attachments), Message("assistant", example.completion))
    return ChatExample(turns, example.source)


def _moved(span: Span, replaced: Sequence[tuple[Span, Span]]) -> Span:
    """A span between or around some replacements, each from one span to another, in order."""
    return _place_moved(span[0], replaced), _place_moved(span[1], replaced)


def _place_moved(place: int, replaced: Sequence[tuple[Span, Span]]) -> int:
    shift = 0
    for old, new in replaced:
        if old[1] <= place:
            shift = new[1] - old[1]
    return place + shift


@lru_cache(maxsize=256)
def _language_start(tokenizer: TranscriptTokenizer, language: str, where: str) -> tuple[int, ...]:
    """What the decoder reads before a transcript in a language, by its code or English name."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    written = language.strip().lower()
    code = TO_LANGUAGE_CODE.get(written, written)
    marks = [f"<|{mark}|>" for mark in ("startoftranscript", code, "transcribe", "notimestamps")]
    known = tokenizer.hf.get_vocab()
    if any(mark not in known for mark in marks):
        raise DataError(
            "unknown-language",
            f"`{language[:40]}` is no language of this base",
            where=f"{where}: language",
            help="write its code (`de`) or its English name (`german`); a base of one language takes no such column.",
        )
    return tuple(known[mark] for mark in marks)


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
