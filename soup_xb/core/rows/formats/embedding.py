"""How pairs of texts are written, in the column names that users of sentence-transformers know."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from soup_xb.core.config.schema import EMBEDDING_FORMAT
from soup_xb.core.rows.examples import EmbeddingExample, Source
from soup_xb.core.rows.fields import read_text
from soup_xb.core.rows.formats.detect import Format

_ALIASES = MappingProxyType(
    {
        **dict.fromkeys(("query", "question", "sentence1"), "anchor"),
        **dict.fromkeys(("pos", "answer", "passage", "document", "sentence2"), "positive"),
        **dict.fromkeys(("neg", "hard_negative"), "negative"),
    }
)


def embedding_formats(query_prompt: str = "", document_prompt: str = "") -> Mapping[str, Format]:
    """The one format of embedding rows, with these prompts before its texts."""

    def read(row: Mapping[str, Any], source: Source) -> EmbeddingExample:
        where = f"{source}: "
        negative = None if row.get("negative") is None else read_text(row, "negative", where)
        return EmbeddingExample(
            anchor=_prompted(query_prompt, read_text(row, "anchor", where)),
            positive=_prompted(document_prompt, read_text(row, "positive", where)),
            negative=None if negative is None else _prompted(document_prompt, negative),
            source=source,
        )

    known = Format(("anchor", "positive"), read, ("negative",), aliases=_ALIASES)
    return MappingProxyType({EMBEDDING_FORMAT: known})


def _prompted(prompt: str, text: str) -> str:
    # A prompt does not make a text of nothing.
    return prompt + text if text.strip() else ""
