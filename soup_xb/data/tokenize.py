"""Examples -> token rows for every task, and a count of what became of them.

The sides of a preference are tokenized together and kept together; texts to embed get the special tokens that
sentence-transformers gives them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from attrs import evolve, frozen

from soup_xb.core.base.folder import BaseFolder
from soup_xb.core.base.model_config import POSITIONS_BEHIND_PADDING
from soup_xb.core.config.schema import Config, DataConfig
from soup_xb.core.errors import DataError, ModelError, Problem
from soup_xb.core.rows.examples import (
    AnyExample,
    ChatExample,
    EmbeddingExample,
    Example,
    JudgedExample,
    Message,
    PreferenceExample,
    PromptExample,
    Source,
    ToolCall,
)
from soup_xb.core.rows.row import Prompt, Row, TokenSequence, same_answers, same_prompts
from soup_xb.core.rows.tools import with_ids
from soup_xb.core.tasks import TASKS
from soup_xb.data.chat_template import ChatTemplate, RenderError, with_tools
from soup_xb.data.tokenizer import ChatTokenizer, Tokenized, special_tokens

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
    examples = [_with_ids(example, tokenizer) for example in examples]
    sides = [side for example in examples for side in sides_of(example)]
    results = iter(tokenizer.tokenize_many(sides, max_length))
    return [
        _prompt(example, tokenizer, max_length)
        if isinstance(example, PromptExample)
        else _together(example, results)
        for example in examples
    ]


def with_call_ids(messages: tuple[Message, ...], tokenizer: ChatTokenizer) -> tuple[Message, ...]:
    """The turns with ids of calls as the chat template takes them; as they are where it takes theirs."""
    if tokenizer.template is None or not any(message.calls or message.role == "tool" for message in messages):
        return messages
    wanted = _wanted_ids(tokenizer.template)
    return with_ids(messages, nine=wanted == "nine") if wanted else messages


def _with_ids(example: AnyExample, tokenizer: ChatTokenizer) -> Any:
    """An example whose conversations have ids that the chat template takes."""
    if isinstance(example, ChatExample | PromptExample):
        messages = with_call_ids(example.messages, tokenizer)
        return example if messages is example.messages else evolve(example, messages=messages)
    if isinstance(example, PreferenceExample):
        chosen, rejected = (_with_ids(side, tokenizer) for side in (example.chosen, example.rejected))
        same = chosen is example.chosen and rejected is example.rejected
        return example if same else evolve(example, chosen=chosen, rejected=rejected)
    if isinstance(example, JudgedExample):
        answer = _with_ids(example.answer, tokenizer)
        return example if answer is example.answer else evolve(example, answer=answer)
    return example


# An id as OpenAI's servers give them, and one that every template takes which asks for one.
_LONG_ID, _SHORT_ID = "call_Xd7qV0aB2cD4eF6gH8iJ0kL2", "probe0001"


@lru_cache(maxsize=8)
def _wanted_ids(template: ChatTemplate) -> Literal["", "any", "nine"]:
    """Whether a template refuses calls without an id, or those whose id has not nine letters, as Mistral's do."""
    try:
        template = with_tools(template, _called(_SHORT_ID))
        template.render(_called(_SHORT_ID).messages)
    except (ModelError, RenderError):
        # It takes no calls at all, which the first row of them is told.
        return ""
    asked: tuple[tuple[str, Literal["any", "nine"]], ...] = ((_LONG_ID, "nine"), ("", "any"))
    for call_id, wanted in asked:
        try:
            template.render(_called(call_id).messages)
        except RenderError:
            return wanted
    return ""


def _called(call_id: str) -> ChatExample:
    """A conversation with a call of this id and its answer."""
    call = ToolCall("look", '{"place": "here"}', call_id)
    turns = (
        Message("user", "Look."),
        Message("assistant", "", (call,)),
        Message("tool", "There.", name="look", call_id=call_id),
        Message("assistant", "It is there."),
    )
    return ChatExample(turns, Source("", 0))


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
        tokens = tokenizer.text_ids(example.text, str(example.source))
    reason = "" if tokens.size else "the prompt is empty"
    if tokens.size > max_length:
        reason = "the prompt is longer than max_length"
    prompt = TokenSequence(tokens, np.zeros(tokens.size, np.bool_), example.source)
    row = None if reason else Row("prompt", (prompt,), Prompt(example.columns))
    plain = "" if example.messages else tokenizer.plain_kind(example.text)
    spelled = tokenizer.spells_control(example.messages)
    forged = tokenizer.plain_marks.spelled(example.messages)
    return Tokenized(example.source, row, reason, spelled=spelled, forged=forged, plain=plain)


def _together(example: AnyExample, results: Iterator[Tokenized]) -> Tokenized:
    """The result of an example from those of its sides."""
    first = next(results)
    if isinstance(example, PreferenceExample):
        return _paired(first, next(results))
    if isinstance(example, JudgedExample) and first.row is not None:
        return evolve(first, row=Row("judged", first.row.sequences, example.desirable))
    return first


def _paired(chosen: Tokenized, rejected: Tokenized) -> Tokenized:
    told = evolve(
        chosen,
        row=None,
        truncated=chosen.truncated or rejected.truncated,
        rewritten=chosen.rewritten + rejected.rewritten,
        hidden=max(chosen.hidden, rejected.hidden),
        spelled=chosen.spelled or rejected.spelled,
        forged=chosen.forged or rejected.forged,
        reshaped=chosen.reshaped or rejected.reshaped,
        cut_by=chosen.cut_by or rejected.cut_by,
    )
    sides: list[TokenSequence] = []
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side.row is None:
            return evolve(told, reason=f"`{name}`: {side.reason}")
        sides += side.row.sequences
    row = Row("pair", tuple(sides))
    return evolve(told, reason=EQUAL_ANSWERS) if same_answers(row) else evolve(told, row=row)


def longest_text(
    asked: int, config: Mapping[str, Any], tokenizer: ChatTokenizer
) -> tuple[int, tuple[Problem, ...]]:
    """Tokens at which texts are cut: `asked`, or fewer where the base has no positions for them; said in a notice."""
    known = [asked, int(min(tokenizer.hf.model_max_length, asked))]
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and positions > 0:
        behind = tokenizer.pad_id + 1 if config.get("model_type") in POSITIONS_BEHIND_PADDING else 0
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
    if not TASKS[config.task].embeds:
        return config.data, ()
    longest, notices = longest_text(config.data.max_length, base.config, tokenizer)
    return evolve(config.data, max_length=longest), notices


def embedding_rows(
    examples: Sequence[AnyExample], tokenizer: ChatTokenizer, max_length: int
) -> list[Tokenized]:
    """One result an example, in order; a row with an empty text has nothing to learn.

    A special token that a text spells stays one: sentence-transformers reads the text so where the model is used.
    """
    found = [example for example in examples if isinstance(example, EmbeddingExample)]
    texts = [text for example in found for text in _texts(example)]
    encoded = iter(encode_texts(texts, tokenizer, max_length))
    special = special_tokens(tokenizer.hf)
    results = [
        evolve(_row(example, encoded), spelled=any(map(special.first, _texts(example)))) for example in found
    ]
    for side in (side for one in results if one.row for side in one.row.sequences):
        tokenizer.checked(side.tokens, str(side.source))
    return results


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
    found = [
        TokenSequence(side.tokens, np.zeros(side.tokens.size, np.bool_), example.source) for side in sides
    ]
    return Tokenized(example.source, Row("embedding", tuple(found)), "", truncated)


# Places named in a notice; the count says how many more there are.
_NAMED = 3


class _Places:
    """A count with the first few places."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, place: object) -> None:
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(str(place))

    def merge(self, count: int, first: Sequence[str]) -> None:
        self.count += count
        self.first = [*self.first, *first][:_NAMED]

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return ", ".join(self.first) + (f" and {more:,} more" if more else "")


class RowTally:
    """What happened to the rows of a file."""

    def __init__(self, name: str, max_length: int) -> None:
        """Count for the file `name`, whose rows are cut at `max_length`."""
        self.chats = False
        self.cut_by = ""
        self.truncated = _Places()
        self._name, self._max_length = name, max_length
        self._reasons: Counter[str] = Counter()
        self._unlearnable, self._rewritten, self._hidden = _Places(), _Places(), _Places()
        self._equal, self._other_prompts, self._spelled = _Places(), _Places(), _Places()
        self._reshaped, self._cut, self._rendered, self._prompted = _Places(), _Places(), _Places(), _Places()
        self._forged, self._spelled_tokens = _Places(), _Places()

    def state(self) -> dict[str, Any]:
        """The counts as JSON holds them, for `merge`."""
        places = {name: [one.count, one.first] for name, one in self._places().items()}
        return {"chats": self.chats, "cut_by": self.cut_by, "reasons": dict(self._reasons), "places": places}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Count what another tally of the same file counted in the rows that follow."""
        self.chats |= state["chats"]
        self.cut_by = self.cut_by or state["cut_by"]
        self._reasons.update(state["reasons"])
        for name, one in self._places().items():
            one.merge(*state["places"][name])

    def _places(self) -> dict[str, _Places]:
        return {name: value for name, value in vars(self).items() if isinstance(value, _Places)}

    def add(self, results: Iterable[Tokenized]) -> None:
        """Count what became of some rows."""
        for result in results:
            if result.row is None:
                self._reasons[result.reason] += 1
                if result.reason == EQUAL_ANSWERS:
                    self._equal.add(result.source)
                else:
                    self._unlearnable.add(f"{result.source} ({result.reason})")
            elif result.row.kind == "pair" and not same_prompts(result.row):
                self._other_prompts.add(result.source)
            self.cut_by = self.cut_by or result.cut_by
            for happened, places in (
                (result.truncated and result.row is not None, self.truncated),
                (result.rewritten and result.row is not None, self._rewritten),
                (result.hidden, self._hidden),
                (result.spelled, self._spelled_tokens if _embeds(result) else self._spelled),
                (result.forged, self._forged),
                (result.reshaped and result.row is not None, self._reshaped),
                (result.cut_by and result.row is None, self._cut),
                (result.plain == "rendered", self._rendered),
                (result.plain == "prompt", self._prompted),
            ):
                if happened:
                    places.add(result.source)

    def nothing_to_learn(self, count: int) -> DataError:
        """The error of a file of `count` rows without one to train on."""
        reasons = "; ".join(f"{reason} ({rows:,})" for reason, rows in self._reasons.most_common())
        return DataError(
            "nothing-to-learn",
            f"there is nothing to learn in any of the {count:,} rows: {reasons}",
            where=self._name,
            help="an assistant turn, a completion, a text, two different answers or two texts that belong together "
            "is what a model learns from; "
            "`soupx data FILE --base BASE` shows the trained tokens.",
        )

    def notices(self) -> Iterator[Problem]:
        """What should be known, worst first; a count of zero says nothing."""
        told = (
            ("rows-without-targets", "left out, with nothing to learn", self._unlearnable),
            ("truncated", f"cut at {self._max_length:,} tokens (`data.max_length`)", self.truncated),
            (
                "rewritten-turns",
                "with an assistant turn that the chat template changes, which is not trained on",
                self._rewritten,
            ),
            ("hidden-turns", "with a turn that the chat template changes or leaves out", self._hidden),
            (
                "prompts-differ",
                "whose prompt is not the same tokens before both answers",
                self._other_prompts,
            ),
            (
                "earlier-form",
                "with an earlier answer that the chat template writes otherwise than a last one (an empty thought "
                "before it, say): `data.train_on: last`, or a row for each answer, trains the form that is asked for",
                self._reshaped,
            ),
            (
                "turn-marks",
                "whose content spells the marks that the chat template writes around turns; they are ordinary words, "
                "so the model cannot tell them from a turn: write them otherwise, or remove the rows",
                self._forged,
            ),
            (
                "rendered-text",
                "of plain text with the chat template's own marks, trained on as they stand; as turns (`messages`, or "
                "`prompt` and `completion` as lists of turns) the template is applied and answers alone are trained on",
                self._rendered,
            ),
            (
                "plain-prompt",
                "whose prompt is plain text: the base's chat template is not used for it; write it as a list of turns "
                '(`[{"role": "user", "content": "…"}]`, the answer too) to use it',
                self._prompted,
            ),
        )
        yield from self._told(told)
        if self._spelled.count:
            text = (
                f"control tokens in content: {_rows(self._spelled.count)}, read as the words that they are spelled "
                f"with: {self._spelled}"
            )
            yield Problem("control-tokens", text, where=self._name)
        if self._spelled_tokens.count:
            text = (
                f"control tokens in content: {_rows(self._spelled_tokens.count)}, read as those tokens, as "
                f"sentence-transformers reads them: {self._spelled_tokens}"
            )
            yield Problem("control-tokens", text, where=self._name)

    def warnings(self) -> Iterator[Problem]:
        """What may be a mistake in the file."""
        cut = (
            f"left out, because the chat template of {self.cut_by} cuts what stands before `</think>` out of the "
            "answers (a template given as `data.chat_template` can keep it)"
        )
        return self._told(
            (
                ("equal-answers", "left out, whose `chosen` and `rejected` are the same tokens", self._equal),
                ("thoughts-cut", cut, self._cut),
            )
        )

    def _told(self, told: Iterable[tuple[str, str, _Places]]) -> Iterator[Problem]:
        for code, what, places in told:
            if places.count:
                yield Problem(code, f"{_rows(places.count)} {what}: {places}", where=self._name)


def _embeds(result: Tokenized) -> bool:
    return result.row is not None and result.row.kind == "embedding"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
