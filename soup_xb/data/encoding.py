"""Text -> token ids, and spans of characters -> trained tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from attrs import frozen

from soup_xb.core.errors import DataError
from soup_xb.data.spans import Markup, Span

# The tokenizers library works on many texts at once, on all cores; more would only hold memory.
BATCH = 512
_HEADS = ("\n", "0")
Array = np.ndarray[Any, Any]


@frozen(eq=False)
class Encoder:
    """A copy of the tokenizer's engine without its post-processor.

    The post-processor would add tokens that the chat template has written already, and move the offsets of
    tokens that begin or end with white space. Padding and truncation that a tokenizer.json may ask for are off.
    """

    engine: Any

    @classmethod
    def of(cls, tokenizer: Any) -> Encoder:
        """The engine of a transformers tokenizer, copied."""
        from tokenizers import Tokenizer

        engine = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        engine.post_processor = None
        engine.no_padding()
        engine.no_truncation()
        return cls(engine)

    def ids(self, text: str) -> list[int]:
        """The ids of one text, nothing added. Raises DataError for text that is not Unicode."""
        ids: list[int] = self._encode([text])[0].ids
        return ids

    def encode(self, markups: Sequence[Markup]) -> list[tuple[Array, Array]]:
        """For each text its token ids, int32 (length,), and which are trained, bool (length,).

        A token is trained if it lies inside a span; white space that it takes from beyond the end does not
        count. Where a token would cross the beginning of a span, the text is cut there, as it is when the model
        goes on writing after a prompt.
        """
        rows = []
        for markup, encoding in zip(markups, self._encode([markup.text for markup in markups]), strict=True):
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            if _crossed(offsets, markup.spans):
                rows.append(self._in_pieces(markup))
            else:
                ids = np.array(encoding.ids, dtype=np.int32)
                rows.append((ids, _inside(offsets, markup)))
        return rows

    def _encode(self, texts: list[str]) -> list[Any]:
        try:
            encodings: list[Any] = self.engine.encode_batch(texts, add_special_tokens=False)
        except TypeError as error:
            raise DataError(
                "broken-text", "holds half of a surrogate pair", help="write it as UTF-8."
            ) from error
        return encodings

    def _in_pieces(self, markup: Markup) -> tuple[Array, Array]:
        borders = sorted({0, *(start for start, _ in markup.spans), len(markup.text)})
        ids: list[int] = []
        trained: list[Array] = []
        for left, right in pairwise(borders):
            spans = tuple((s - left, e - left) for s, e in markup.spans if left <= s < right)
            piece = Markup(markup.text[left:right], spans)
            piece_ids, offsets = self._continuation(piece.text) if left else self._beginning(piece.text)
            ids += piece_ids
            trained.append(_inside(offsets, piece))
        return np.array(ids, dtype=np.int32), np.concatenate(trained)

    def _beginning(self, text: str) -> tuple[list[int], Array]:
        encoding = self._encode([text])[0]
        return encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)

    def _continuation(self, text: str) -> tuple[list[int], Array]:
        """The tokens of a text that goes on: encoded after a character, which is taken off again.

        SentencePiece models put a space before the first word of a text; inside a text they do not. A second
        character is tried where the first one joins what follows into one token.
        """
        for head in _HEADS:
            head_ids = self.ids(head)
            ids, offsets = self._beginning(head + text)
            count = len(head_ids)
            if ids[:count] == head_ids and len(ids) > count and offsets[count, 0] >= len(head):
                return ids[count:], offsets[count:] - len(head)
        return self._beginning(text)


def _crossed(offsets: Array, spans: Sequence[Span]) -> bool:
    """Whether a token begins before a span and ends inside it."""
    return any(bool(((offsets[:, 0] < start) & (offsets[:, 1] > start)).any()) for start, _ in spans)


def _inside(offsets: Array, markup: Markup) -> Array:
    trained = np.zeros(len(offsets), dtype=np.bool_)
    text = markup.text
    for start, end in markup.spans:
        # A token may take white space from beyond the end: `<|end|>` of Phi-3 takes the line break.
        reach = end
        while reach < len(text) and text[reach].isspace():
            reach += 1
        trained |= (offsets[:, 0] >= start) & (offsets[:, 0] < end) & (offsets[:, 1] <= reach)
    return trained
