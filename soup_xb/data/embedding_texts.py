"""Texts to embed -> token rows, as sentence-transformers makes them: with the tokenizer's own special tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import evolve, frozen

from soup_xb.core.base.folder import BaseFolder
from soup_xb.core.config.schema import Config, DataConfig
from soup_xb.core.errors import Problem
from soup_xb.core.rows.embedding_rows import EmbeddingRow
from soup_xb.core.rows.examples import AnyExample, EmbeddingExample, TokenRow
from soup_xb.data.tokenizer import ChatTokenizer, Tokenized

# Types whose first position is the one behind the padding token's id.
_POSITIONS_BEHIND_PADDING = (
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer",
    "data2vec-text", "ibert", "xmod",
)  # fmt: skip


def longest_text(
    asked: int, config: Mapping[str, Any], tokenizer: ChatTokenizer
) -> tuple[int, tuple[Problem, ...]]:
    """Tokens at which texts are cut: `asked`, or fewer where the base has no positions for them; said in a notice."""
    known = [asked, int(min(tokenizer.hf.model_max_length, asked))]
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and positions > 0:
        behind = tokenizer.pad_id + 1 if config.get("model_type") in _POSITIONS_BEHIND_PADDING else 0
        known.append(positions - behind)
    longest = min(known)
    if longest == asked:
        return asked, ()
    message = f"texts are cut at {longest} tokens, the longest that the base takes, not at {asked}"
    return longest, (Problem("longest-text", message, where="data.max_length"),)


def fitted_data(
    config: Config, base: BaseFolder, tokenizer: ChatTokenizer
) -> tuple[DataConfig, tuple[Problem, ...]]:
    """The data section with the length at which texts are really cut, for `task: embedding`; else as it is."""
    if config.task != "embedding":
        return config.data, ()
    longest, notices = longest_text(config.data.max_length, base.config, tokenizer)
    return evolve(config.data, max_length=longest), notices


def embedding_rows(
    examples: Sequence[AnyExample], tokenizer: ChatTokenizer, max_length: int
) -> list[Tokenized]:
    """One result an example, in order; a row with an empty text has nothing to learn."""
    found = [example for example in examples if isinstance(example, EmbeddingExample)]
    texts = [text for example in found for text in _texts(example)]
    encoded = iter(encode_texts(texts, tokenizer, max_length))
    return [_row(example, encoded) for example in found]


@frozen(eq=False)
class EncodedText:
    """The ids of a text, cut at the length that was asked for."""

    tokens: np.ndarray[Any, Any]
    truncated: bool


def encode_texts(texts: Sequence[str], tokenizer: ChatTokenizer, max_length: int) -> list[EncodedText]:
    """Each text with the tokenizer's special tokens; what is cut away stands before the last of those."""
    if not texts:
        return []
    # A long text is looked at twice; the tokenizer warns of a first look that is beyond its own limit.
    whole = tokenizer.hf(list(texts), add_special_tokens=True, verbose=False).input_ids
    cut = {index for index, ids in enumerate(whole) if len(ids) > max_length}
    if cut:
        again = tokenizer.hf(
            [texts[index] for index in sorted(cut)],
            add_special_tokens=True,
            truncation=True,
            max_length=max_length,
        ).input_ids
        for index, ids in zip(sorted(cut), again, strict=True):
            whole[index] = ids
    return [EncodedText(np.array(ids, dtype=np.int32), index in cut) for index, ids in enumerate(whole)]


def _texts(example: EmbeddingExample) -> tuple[str, ...]:
    pair = (example.anchor, example.positive)
    return pair if example.negative is None else (*pair, example.negative)


def _row(example: EmbeddingExample, encoded: Iterator[EncodedText]) -> Tokenized:
    names = ("anchor", "positive", "negative")
    texts = _texts(example)
    sides = [next(encoded) for _ in texts]
    truncated = any(side.truncated for side in sides)
    for name, text, side in zip(names, texts, sides, strict=False):
        if not text.strip() or not side.tokens.size:
            return Tokenized(example.source, None, f"`{name}` is empty", truncated)
    rows = [TokenRow(side.tokens, np.zeros(side.tokens.size, np.bool_), example.source) for side in sides]
    return Tokenized(example.source, EmbeddingRow(*rows), "", truncated)
