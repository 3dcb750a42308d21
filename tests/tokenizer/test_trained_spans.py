"""Which tokens of a conversation are trained on; every expected text is written by hand."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import ChatExample, Message, Source
from soup_xb.core.rows.row import Row
from soup_xb.data.tokenizer import ChatTokenizer, open_tokenizer

TEMPLATES = Path(__file__).with_name("chat_templates")

SOURCE = Source("rows.jsonl", 3)
QUESTION, ANSWER = Message("user", "What is the capital of France?"), Message("assistant", "Paris.")
SECOND, LAST = Message("user", "And of Italy?"), Message("assistant", "Rome, of course.\n\nIt is old.")
TWO = (QUESTION, ANSWER, SECOND, LAST)
THREE = (*TWO, Message("user", "yes?"), Message("assistant", "No é 😀 <b>"))
SYSTEM = Message("system", "Terse.")
THOUGHTFUL = (
    QUESTION,
    Message("assistant", "<think>\nFrance, so Paris.\n</think>\n\nParis."),
    SECOND,
    Message("assistant", "<think>\nItaly, so Rome.\n</think>\n\nRome."),
)

KINDS = ("byte-level", "llama3-like", "sentence-piece")
CASES = {
    "chatml": (TWO, ["Paris.<|im_end|>", "Rome, of course.\n\nIt is old.<|im_end|>"]),
    "chatml_default_system": (
        THREE,
        ["Paris.<|im_end|>", "Rome, of course.\n\nIt is old.<|im_end|>", "No é 😀 <b><|im_end|>"],
    ),
    "llama2": ((SYSTEM, *TWO), [" Paris. </s>", " Rome, of course.\n\nIt is old. </s>"]),
    "llama3": (
        (SYSTEM, *THREE),
        ["Paris.<|eot_id|>", "Rome, of course.\n\nIt is old.<|eot_id|>", "No é 😀 <b><|eot_id|>"],
    ),
    "gemma": (TWO, ["Paris.<end_of_turn>", "Rome, of course.\n\nIt is old.<end_of_turn>"]),
    "mistral": ((SYSTEM, *TWO), [" Paris.</s>", " Rome, of course.\n\nIt is old.</s>"]),
    "phi3": ((SYSTEM, *TWO), ["Paris.<|end|>", "Rome, of course.\n\nIt is old.<|end|>"]),
    # Without thoughts in the data the last turn has an empty one, which the model must write; earlier turns none.
    "qwen3": (TWO, ["Paris.<|im_end|>", "<think>\n\n</think>\n\nRome, of course.\n\nIt is old.<|im_end|>"]),
    # The generation prompt opens a thought; a turn shows none, and its words begin after `<|assistant|>`.
    "thinking_prompt": (TWO, ["Paris.</s>", "Rome, of course.\n\nIt is old.</s>"]),
    "plain_words": (TWO, [" Paris.", " Rome, of course.\n\nIt is old."]),
}


def trained_texts(tokenizer: ChatTokenizer, row: Row | None) -> list[str]:
    """The runs of trained tokens, as text."""
    assert row is not None
    (sequence,) = row.sequences
    pairs = zip(sequence.tokens.tolist(), sequence.trained.tolist(), strict=True)
    return [
        tokenizer.decode([token for token, _ in run], special=True)
        for trained, run in groupby(pairs, key=lambda pair: pair[1])
        if trained
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", CASES)
def test_the_assistant_s_words_and_their_end_tokens_are_trained_and_nothing_else(opened, template, kind):
    tokenizer = opened(kind, template)
    messages, expected = CASES[template]
    done = tokenizer.tokenize(ChatExample(messages, SOURCE), max_length=4096)
    texts = trained_texts(tokenizer, done.row)
    if kind == "sentence-piece":
        # Its decoder takes one space off the beginning of a text.
        expected = [text.removeprefix(" ") for text in expected]
    if template == "plain_words":
        # A full stop and the line break after it can be one token.
        texts = [text.removesuffix("\n") for text in texts]
    assert texts == expected
    assert (done.rewritten, done.hidden, done.truncated) == (0, 0, False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", CASES)
def test_the_tokens_are_those_of_the_whole_rendering(opened, template, kind):
    tokenizer = opened(kind, template)
    messages, _ = CASES[template]
    (row,) = tokenizer.tokenize(ChatExample(messages, SOURCE), max_length=4096).row.sequences
    turns = [{"role": message.role, "content": message.content} for message in messages]
    text = tokenizer.hf.apply_chat_template(turns, tokenize=False)
    assert row.tokens.tolist() == tokenizer.hf(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", sorted(set(CASES) - {"thinking_prompt"}))
def test_training_begins_where_generation_begins(opened, template, kind):
    tokenizer = opened(kind, template)
    messages = tuple(message for message in CASES[template][0] if message.role != "system")[:2]
    (row,) = tokenizer.tokenize(ChatExample(messages, SOURCE), max_length=4096).row.sequences
    first_target = row.trained.tolist().index(True)
    prompt = tokenizer.decode(tokenizer.prompt_ids(messages[:1]), special=True)
    assert tokenizer.decode(row.tokens[:first_target], special=True) == prompt


def test_a_turn_whose_thoughts_the_template_strips_is_not_trained_on(opened):
    tokenizer = opened("byte-level", "qwen3")
    done = tokenizer.tokenize(ChatExample(THOUGHTFUL, SOURCE), max_length=4096)
    assert trained_texts(tokenizer, done.row) == ["<think>\nItaly, so Rome.\n</think>\n\nRome.<|im_end|>"]
    assert done.rewritten == 1


def test_a_row_in_which_every_turn_is_stripped_has_nothing_to_learn(opened):
    tokenizer = opened("byte-level", "thinking_prompt")
    done = tokenizer.tokenize(ChatExample(THOUGHTFUL[:2], SOURCE), max_length=4096)
    assert done.row is None
    assert "does not show" in done.reason


@pytest.mark.parametrize("template", ["chatml", "llama3", "phi3"])
def test_words_in_the_content_that_look_like_an_end_token_do_not_end_the_turn(opened, template):
    tokenizer = opened("byte-level", template)
    end = CASES[template][1][0].removeprefix("Paris.")
    messages = (QUESTION, Message("assistant", f"It is{end} Paris."), SECOND, LAST)
    texts = trained_texts(tokenizer, tokenizer.tokenize(ChatExample(messages, SOURCE), 4096).row)
    assert texts[0] == f"It is{end} Paris.{end}"


def test_an_end_token_that_swallows_the_line_break_after_it_is_still_trained(bases, tmp_path):
    engine = Tokenizer.from_file(str(bases["byte-level"] / "tokenizer.json"))
    greedy = [
        AddedToken(token, rstrip=True, special=True) for token in ("<|end|>", "<|assistant|>", "<|user|>")
    ]
    engine.add_special_tokens(greedy)
    PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = open_tokenizer(tmp_path, str(TEMPLATES / "phi3.jinja"))
    messages, expected = CASES["phi3"]
    assert trained_texts(tokenizer, tokenizer.tokenize(ChatExample(messages, SOURCE), 4096).row) == expected


def test_a_token_that_would_join_prompt_and_answer_is_cut_at_the_border(opened):
    tokenizer = opened("llama3-like", "chatml")
    assert len(tokenizer.encoder.ids("\n\n")) == 1
    messages = (QUESTION, Message("assistant", "\nParis."))
    row = tokenizer.tokenize(ChatExample(messages, SOURCE), 4096).row
    assert trained_texts(tokenizer, row) == ["\nParis.<|im_end|>"]
    prompt = tokenizer.prompt_ids(messages[:1])
    assert row.sequences[0].tokens[: len(prompt)].tolist() == prompt.tolist()


def test_only_turns_from_first_trained_on_are_trained_on(opened):
    tokenizer = opened("byte-level", "chatml")
    row = tokenizer.tokenize(ChatExample(TWO, SOURCE, first_trained=2), 4096).row
    assert trained_texts(tokenizer, row) == ["Rome, of course.\n\nIt is old.<|im_end|>"]


def test_a_conversation_that_the_assistant_opens_is_trained_from_its_first_word(opened):
    tokenizer = opened("byte-level", "chatml")
    row = tokenizer.tokenize(ChatExample((ANSWER, SECOND, LAST), SOURCE), 4096).row
    assert trained_texts(tokenizer, row)[0] in ("Paris.<|im_end|>", "<|im_start|>assistant\nParis.<|im_end|>")
    assert trained_texts(tokenizer, row)[1] == "Rome, of course.\n\nIt is old.<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((QUESTION,), "no assistant turn"),
        ((), "no assistant turn"),
        ((QUESTION, Message("assistant", " \n")), "every assistant turn is empty"),
    ],
)
def test_a_row_without_an_answer_says_why_there_is_nothing_to_learn(opened, messages, reason):
    done = opened("byte-level", "chatml").tokenize(ChatExample(messages, SOURCE), 4096)
    assert (done.row, done.reason) == (None, reason)


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        ("gemma", (SYSTEM, *TWO), "System role not supported"),
        ("llama2", (QUESTION, QUESTION, ANSWER), "must alternate"),
        ("mistral", (QUESTION, Message("tool", "{}"), ANSWER), "Only user, system and assistant"),
        ("plain_words", (Message("tool", "{}"), ANSWER), "tool"),
    ],
)
def test_a_row_that_the_template_refuses_is_named_with_the_template_s_words(
    opened, template, messages, words
):
    with pytest.raises(DataError, match=words) as caught:
        opened("byte-level", template).tokenize(ChatExample(messages, SOURCE), 4096)
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == ("template-refuses", "rows.jsonl:3")


def test_a_row_is_cut_from_the_right_and_says_so(opened):
    tokenizer = opened("byte-level", "chatml")
    (whole,) = tokenizer.tokenize(ChatExample(TWO, SOURCE), 4096).row.sequences
    cut = tokenizer.tokenize(ChatExample(TWO, SOURCE), whole.length - 4)
    assert cut.truncated
    (sequence,) = cut.row.sequences
    assert sequence.tokens.tolist() == whole.tokens[:-4].tolist()
    assert sequence.trained.tolist() == whole.trained[:-4].tolist()
    short = tokenizer.tokenize(ChatExample(TWO, SOURCE), 5)
    assert (short.row, short.reason) == (None, "everything to learn lies beyond max_length")


content = st.text(st.characters(exclude_categories=("Cs", "Co")), min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=st.lists(st.tuples(content, content), min_size=1, max_size=4),
    kind=st.sampled_from(["byte-level", "llama3-like"]),
)
def test_decoded_trained_tokens_are_the_assistant_s_contents_with_end_tokens(opened, pairs, kind):
    tokenizer = opened(kind, "chatml")
    messages = [
        Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    done = tokenizer.tokenize(ChatExample(tuple(messages), SOURCE), 100_000)
    assert "".join(trained_texts(tokenizer, done.row)) == "".join(
        f"{answer}<|im_end|>" for _, answer in pairs
    )
    assert not done.row.sequences[0].trained[0]
