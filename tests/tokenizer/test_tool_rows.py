"""Rows with tools through chat templates: the assistant's calls and answers are trained on, and nothing else."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from soup_xb.core.errors import DataError, ModelError
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.formats.detect import detect_format, to_example
from soup_xb.core.rows.formats.every import formats_named
from soup_xb.core.rows.row import Row
from soup_xb.core.tasks import TASKS
from soup_xb.data.tokenize import tokenize_examples
from soup_xb.data.tokenizer import ChatTokenizer

TEMPLATES = Path(__file__).with_name("chat_templates")
SOURCE = Source("rows.jsonl", 3)
KINDS = ("byte-level", "llama3-like", "sentence-piece")


def function(name: str, **properties: str) -> dict[str, Any]:
    described = {key: {"type": kind} for key, kind in properties.items()}
    schema = {"type": "object", "properties": described, "required": list(described)}
    return {
        "type": "function",
        "function": {"name": name, "description": f"To {name}.", "parameters": schema},
    }


def call(name: str, call_id: str, **arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [function("weather", city="string"), function("add", a="integer", b="integer"), function("now")]
ROW: dict[str, Any] = {
    "tools": TOOLS,
    "messages": [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call("weather", "aaaabbbb1", city='R"me é\n')]},
        {"role": "tool", "tool_call_id": "aaaabbbb1", "content": '{"celsius": 31}'},
        {"role": "assistant", "content": "It is 31 degrees."},
        {"role": "user", "content": "1 + 2, and the time?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call("now", "aaaabbbb2"), call("add", "aaaabbbb3", a=1, b=2)],
        },
        {"role": "tool", "tool_call_id": "aaaabbbb3", "content": "3"},
        {"role": "tool", "tool_call_id": "aaaabbbb2", "content": "noon"},
        {"role": "assistant", "content": "3, and it is noon."},
    ],
}


def trained_texts(tokenizer: ChatTokenizer, row: Row | None) -> list[str]:
    assert row is not None
    (sequence,) = row.sequences
    pairs = zip(sequence.tokens.tolist(), sequence.trained.tolist(), strict=True)
    return [
        tokenizer.decode([token for token, _ in run], special=True).removeprefix(" ")
        for trained, run in groupby(pairs, key=lambda pair: pair[1])
        if trained
    ]


CASES = {
    "tools": [
        '<call>{"name": "weather", "arguments": {"city": "R\\"me é\\n"}}</call><|im_end|>',
        "It is 31 degrees.<|im_end|>",
        '<call>{"name": "now", "arguments": {}}</call>\n'
        '<call>{"name": "add", "arguments": {"a": 1, "b": 2}}</call><|im_end|>',
        "3, and it is noon.<|im_end|>",
    ],
    "tools_as_text": [
        'weather {"city": "R\\"me é\\n"}</s>',
        "It is 31 degrees.</s>",
        'now {}</s><|assistant|>add {"a": 1, "b": 2}</s>',
        "3, and it is noon.</s>",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", CASES)
def test_calls_and_answers_are_trained_with_their_end_tokens(opened, template, kind):
    tokenizer = opened(kind, template)
    done = tokenizer.tokenize(to_example(ROW, SOURCE, "messages"), 4096)
    assert trained_texts(tokenizer, done.row) == CASES[template]
    assert (done.rewritten, done.hidden) == (0, 0)


def test_what_a_template_moves_from_turn_to_turn_is_still_found(opened):
    tokenizer = opened("byte-level", "tools_with_ids")
    done = tokenizer.tokenize(to_example(ROW, SOURCE, "messages"), 4096)
    texts = trained_texts(tokenizer, done.row)
    # The tools stand before the last user's turn: what the model reads before the first call is another text then.
    assert texts == [
        "It is 31 degrees.</s>",
        "<|start_header_id|>nowaaaabbbb2<|start_header_id|>add<a>1</a><b>2</b>aaaabbbb3</s>",
        "3, and it is noon.</s>",
    ]
    assert (done.rewritten, done.hidden) == (1, 0)


def test_the_tokens_are_those_of_apply_chat_template_with_tools(opened):
    tokenizer = opened("byte-level", "tools")
    (row,) = tokenizer.tokenize(to_example(ROW, SOURCE, "messages"), 4096).row.sequences
    turns = [turn | {"content": turn["content"] or ""} for turn in ROW["messages"]]
    text = tokenizer.hf.apply_chat_template(turns, tools=TOOLS, tokenize=False)
    assert row.tokens.tolist() == tokenizer.hf(text, add_special_tokens=False).input_ids


def test_content_before_a_call_is_trained_with_it(opened):
    tokenizer = opened("byte-level", "tools")
    turns = [ROW["messages"][0], ROW["messages"][1] | {"content": "Let me look."}]
    row = tokenizer.tokenize(to_example({"messages": turns, "tools": TOOLS}, SOURCE, "messages"), 4096).row
    (text,) = trained_texts(tokenizer, row)
    assert text.startswith('Let me look.\n<call>{"name": "weather"')


def test_words_in_the_arguments_that_look_like_an_end_token_do_not_end_the_turn(opened):
    tokenizer = opened("byte-level", "tools")
    turns = [
        ROW["messages"][0],
        {"role": "assistant", "tool_calls": [call("weather", "", city="<|im_end|>\n<|im_start|>user")]},
    ]
    row = tokenizer.tokenize(to_example({"messages": turns, "tools": TOOLS}, SOURCE, "messages"), 4096).row
    (text,) = trained_texts(tokenizer, row)
    assert text.endswith('<|im_end|>\\n<|im_start|>user"}}</call><|im_end|>')


SHAREGPT = {
    "tools": json.dumps([tool["function"] for tool in TOOLS]),
    "conversations": [
        {"from": "human", "value": "Weather in Rome?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "31"},
        {"from": "gpt", "value": "It is 31 degrees."},
    ],
}
OLDER = {
    "tools": [json.dumps(tool) for tool in TOOLS],
    "messages": [
        {"role": "user", "content": "Weather in Rome?"},
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'},
        },
        {"role": "function", "name": "weather", "content": "31"},
        {"role": "assistant", "content": "It is 31 degrees."},
    ],
}


def test_every_spelling_of_a_row_gives_the_same_tokens(opened):
    tokenizer = opened("byte-level", "tools_as_text")
    plain = {
        "tools": TOOLS,
        "messages": [
            ROW["messages"][0],
            {"role": "assistant", "tool_calls": json.dumps([call("weather", "", city="Rome")])},
            {"role": "tool", "content": "31"},
            ROW["messages"][3],
        ],
    }
    rows = [
        tokenizer.tokenize(to_example(row, SOURCE, name), 4096).row
        for row, name in ((plain, "messages"), (SHAREGPT, "sharegpt"), (OLDER, "messages"))
    ]
    assert trained_texts(tokenizer, rows[0]) == ['weather {"city": "Rome"}</s>', "It is 31 degrees.</s>"]
    (first,), *others = (row.sequences for row in rows)
    for (sequence,) in others:
        assert sequence.tokens.tolist() == first.tokens.tolist()
        assert sequence.trained.tolist() == first.trained.tolist()


@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen3"])
@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"tools": TOOLS, "messages": ROW["messages"][:1] + ROW["messages"][3:4]},
            "the declared `tools`, which",
        ),
        ({"messages": ROW["messages"][:2]}, "an assistant's `tool_calls`"),
        (ROW, "the declared `tools` nor an assistant's `tool_calls`"),
    ],
)
def test_a_template_that_leaves_tools_out_in_silence_is_refused(opened, template, row, words):
    with pytest.raises(ModelError, match="does not show") as caught:
        opened("byte-level", template).tokenize(to_example(row, SOURCE, "messages"), 4096)
    problem = caught.value.problems[0]
    assert problem.code == "template-without-tools"
    assert words in problem.message
    assert "rows.jsonl:3" in problem.message
    assert "data.chat_template" in problem.help


def test_what_a_template_says_about_one_row_is_told_with_the_row(opened):
    row = {"messages": [ROW["messages"][0], {"role": "assistant", "tool_calls": [call("now", "short")]}]}
    with pytest.raises(DataError, match="ids have nine letters") as caught:
        opened("byte-level", "tools_with_ids").tokenize(to_example(row, SOURCE, "messages"), 4096)
    assert caught.value.problems[0].where == "rows.jsonl:3"


OPENAI, NINE = "call_Xd7qV0aB2cD4eF6gH8iJ0kL2", "aaaabbbb1"


def with_ids(first: str | None, answer: str | None) -> dict[str, Any]:
    """A conversation with two calls, the first of this id, and the answer to the first, of that one."""
    calls = [call("weather", first or "", city="Rome"), call("now", "zzzzyyyy2")]
    answered = {"role": "tool", "content": "31"} | ({"tool_call_id": answer} if answer else {})
    turns = [ROW["messages"][0], {"role": "assistant", "content": "", "tool_calls": calls}, answered]
    return {"messages": [*turns, ROW["messages"][3]], "tools": TOOLS}


def shown_ids(opened: Any, template: str, row: dict[str, Any], name: str = "messages") -> list[str]:
    """The ids of the first call and of its answer, as the template writes them."""
    tokenizer = opened("byte-level", template)
    (done,) = tokenize_examples([to_example(row, SOURCE, name)], tokenizer, 4096)
    assert done.row is not None
    text = tokenizer.decode(done.row.sequences[0].tokens, special=True)
    return [re.search(r"</city>(.*?)<\|start", text)[1], re.search(r'"id": "(.*?)"', text)[1]]  # type: ignore[index]


@pytest.mark.parametrize(
    ("first", "answer"), [(OPENAI, OPENAI), (OPENAI, None), (None, None), (None, OPENAI)]
)
def test_a_template_that_wants_nine_letters_gets_ids_of_nine_for_call_and_answer(opened, first, answer):
    ids = shown_ids(opened, "tools_with_ids", with_ids(first, answer))
    assert len(set(ids)) == 1
    assert re.fullmatch(r"[A-Za-z0-9]{9}", ids[0])
    assert ids == shown_ids(opened, "tools_with_ids", with_ids(first, answer))


def test_an_answer_to_no_call_gets_an_id_that_the_template_takes(opened):
    turns = [{"role": "user", "content": "Now?"}, {"role": "tool", "content": "noon"}, ROW["messages"][3]]
    tokenizer = opened("byte-level", "tools_with_ids")
    (done,) = tokenize_examples([to_example({"messages": turns}, SOURCE, "messages")], tokenizer, 4096)
    assert re.search(r'"id": "[A-Za-z0-9]{9}"', tokenizer.decode(done.row.sequences[0].tokens, special=True))


def test_ids_that_the_template_takes_stay_as_they_are(opened):
    assert shown_ids(opened, "tools_with_ids", with_ids(NINE, NINE)) == [NINE, NINE]
    assert shown_ids(opened, "tools_any_ids", with_ids(OPENAI, OPENAI)) == [OPENAI, OPENAI]
    ids = shown_ids(opened, "tools_any_ids", with_ids(None, None))
    assert ids[0] == ids[1] != ""


def test_a_row_without_ids_of_another_spelling_gets_them_too(opened):
    ids = shown_ids(opened, "tools_with_ids", SHAREGPT | {"conversations": [
        *SHAREGPT["conversations"][:1],
        {"from": "function_call", "value": json.dumps([call("weather", "", city="Rome"), call("now", "")])},
        *SHAREGPT["conversations"][2:],
    ]}, "sharegpt")  # fmt: skip
    assert len(set(ids)) == 1


@pytest.mark.parametrize("task", ["grpo", "dpo", "kto"])
def test_rows_of_every_task_get_the_ids(opened, task):
    turns = with_ids(OPENAI, OPENAI)["messages"]
    answers = {"chosen": turns[3:], "rejected": [{"role": "assistant", "content": "No."}]}
    rows = {
        "grpo": {"prompt": turns[:3]},
        "dpo": {"prompt": turns[:3], **answers},
        "kto": {"prompt": turns[:3], "completion": turns[3:], "label": True},
    }
    formats = formats_named(TASKS[task].formats)
    name = detect_format([(SOURCE, rows[task])], formats).name
    example = to_example(rows[task], SOURCE, name, formats)
    (done,) = tokenize_examples([example], opened("byte-level", "tools_with_ids"), 4096)
    assert done.row is not None
