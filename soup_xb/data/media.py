"""Rows with pictures or sounds -> token rows: the processor says how many tokens each file becomes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from attrs import evolve, field, fields, frozen

from soup_xb.core.adapter.extras import write_media_kind
from soup_xb.core.config.schema import MEDIA_TASKS
from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import ChatExample, Example, Message, RowMedia, TokenRow
from soup_xb.core.text import mask_file
from soup_xb.data.encoding import Array
from soup_xb.data.inputs import InputMaker
from soup_xb.data.media_files import find_files
from soup_xb.data.processor import KEPT_FILES, open_processor
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

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, the processor's settings as the base has them, and the kind of the files."""
        super().save(folder)
        write_media_kind(folder, self.maker.kind)
        for name in KEPT_FILES:
            if (self.base / name).is_file():
                shutil.copyfile(self.base / name, folder / name)
                mask_file(folder / name)

    def _markup(self, example: Example) -> Markup:
        markup = super()._markup(_as_conversation(example))
        if not example.attachments or not markup.spans:
            return markup
        where = str(example.source)
        files = find_files(example.attachments, example.source)
        media = RowMedia(files, markup.text, where, self.maker.inputs)
        self._check_marks(markup.text, len(files), where)
        expanded = self.maker.expand(media)
        spans = tuple(_moved(span, expanded.replaced) for span in markup.spans)
        return MediaMarkup(
            expanded.text,
            spans,
            markup.rewritten,
            markup.hidden,
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
        result = super()._tokenized(_as_conversation(example), markup, encoded, max_length)
        if places.size and places[-1] >= max_length:
            reason = f"its files alone reach beyond max_length ({places[-1] + 1:,} tokens)"
            return evolve(result, row=None, reason=reason)
        if isinstance(markup, MediaMarkup) and isinstance(result.row, TokenRow):
            return evolve(result, row=evolve(result.row, media=markup.media))
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
        if isinstance(markup, MediaMarkup) and isinstance(result.row, TokenRow):
            return evolve(result, row=evolve(result.row, media=markup.media))
        return result

    def _start_of(self, example: Example) -> tuple[int, ...]:
        language = "" if isinstance(example, ChatExample) else example.language
        return _language_start(self, language, str(example.source)) if language else self.prefix


def open_tokenizer_for(task: str, base: Path, chat_template: str | None = None) -> ChatTokenizer:
    """The tokenizer in a local folder for rows of a task, with the base's processor where they have files."""
    if task in MEDIA_TASKS:
        return open_media_tokenizer(base, chat_template, task)
    return open_tokenizer(base, chat_template)


def open_media_tokenizer(base: Path, chat_template: str | None, task: str) -> MediaTokenizer:
    """The tokenizer and processor in a local folder, for rows of `vision` or `audio`.

    Raises as `open_tokenizer` and `open_processor` do, and ModelError for a processor that reads no such files.
    """
    from transformers import AutoConfig

    processor = open_processor(base)
    plain = open_tokenizer(base, chat_template, processor)
    config = AutoConfig.from_pretrained(str(base), trust_remote_code=False, local_files_only=True)
    told = {one.name: getattr(plain, one.name) for one in fields(ChatTokenizer)}
    maker = InputMaker.of(processor, base, MEDIA_TASKS[task])
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
    """A span behind some replacements, each from one span to another, in order."""
    shift = 0
    for old, new in replaced:
        if old[1] <= span[0]:
            shift = new[1] - old[1]
    return span[0] + shift, span[1] + shift


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
