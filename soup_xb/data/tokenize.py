"""Examples -> token rows for every task: the sides of a preference are tokenized together and kept together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attrs import evolve

from soup_xb.core.rows.examples import (
    AnyExample,
    ChatExample,
    EmbeddingExample,
    Example,
    JudgedExample,
    PreferenceExample,
    PromptExample,
    TokenRow,
)
from soup_xb.core.rows.preferences import JudgedRow, PairRow
from soup_xb.core.rows.prompts import PromptRow
from soup_xb.data.embedding_texts import embedding_rows
from soup_xb.data.tokenizer import ChatTokenizer, Tokenized

EQUAL_ANSWERS = "both answers are the same tokens"


def tokenize_examples(
    examples: Sequence[AnyExample], tokenizer: ChatTokenizer, max_length: int
) -> list[Tokenized]:
    """One result an example, in order; each side is cut from the right at `max_length` tokens by itself.

    A pair of which one side has nothing to learn has no row, nor has a pair of equal answers. Raises as
    `ChatTokenizer.tokenize` does.
    """
    if any(isinstance(example, EmbeddingExample) for example in examples):
        return embedding_rows(examples, tokenizer, max_length)
    sides = [side for example in examples for side in sides_of(example)]
    results = iter(tokenizer.tokenize_many(sides, max_length))
    return [
        _prompt(example, tokenizer, max_length)
        if isinstance(example, PromptExample)
        else _together(example, results)
        for example in examples
    ]


def sides_of(example: AnyExample) -> tuple[Example, ...]:
    """What of an example holds an answer: one side of most, two of a preference, or nothing."""
    if isinstance(example, EmbeddingExample | PromptExample):
        return ()
    if isinstance(example, PreferenceExample):
        return (example.chosen, example.rejected)
    return (example.answer,) if isinstance(example, JudgedExample) else (example,)


def is_chat(example: AnyExample) -> bool:
    """Whether a conversation is in it, which needs a chat template."""
    if isinstance(example, PromptExample):
        return bool(example.messages)
    return any(isinstance(side, ChatExample) for side in sides_of(example))


def _prompt(example: PromptExample, tokenizer: ChatTokenizer, max_length: int) -> Tokenized:
    """A prompt is whole or left out: what is cut asks for something else."""
    if example.messages:
        tokens = tokenizer.prompt_ids(example.messages, str(example.source))
    else:
        tokens = tokenizer.text_ids(example.text)
    reason = "" if tokens.size else "the prompt is empty"
    if tokens.size > max_length:
        reason = "the prompt is longer than max_length"
    row = None if reason else PromptRow(tokens, example.columns, example.source)
    return Tokenized(example.source, row, reason)


def _together(example: AnyExample, results: Iterator[Tokenized]) -> Tokenized:
    """The result of an example from those of its sides."""
    first = next(results)
    if isinstance(example, PreferenceExample):
        return _paired(first, next(results))
    if isinstance(example, JudgedExample) and isinstance(first.row, TokenRow):
        return evolve(first, row=JudgedRow(first.row, example.desirable))
    return first


def _paired(chosen: Tokenized, rejected: Tokenized) -> Tokenized:
    told = evolve(
        chosen,
        row=None,
        truncated=chosen.truncated or rejected.truncated,
        rewritten=chosen.rewritten + rejected.rewritten,
        hidden=max(chosen.hidden, rejected.hidden),
    )
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side.row is None:
            return evolve(told, reason=f"`{name}`: {side.reason}")
    assert isinstance(chosen.row, TokenRow)
    assert isinstance(rejected.row, TokenRow)
    row = PairRow(chosen.row, rejected.row)
    return evolve(told, reason=EQUAL_ANSWERS) if row.is_equal else evolve(told, row=row)
