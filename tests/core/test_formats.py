"""What rows mean: formats, their detection, and every field that can be wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soup_xb.core.config.load import parse_config
from soup_xb.core.errors import ConfigError, DataError
from soup_xb.core.rows.examples import ChatExample, CompletionExample, Message, Source
from soup_xb.core.rows.files import Cells
from soup_xb.core.rows.formats.detect import FORMATS, ExampleReader, detect_format, extra_columns, to_example
from soup_xb.core.rows.formats.every import EVERY_FORMAT, formats_named
from soup_xb.core.rows.formats.media import media_formats
from soup_xb.core.tasks import FORMATS as EVERY_NAME
from soup_xb.core.tasks import TASKS
from soup_xb.core.tasks.task import COLUMNS

SOURCE = Source("rows.jsonl", 7)


def chat(*turns: tuple[str, str], first_trained: int = 0) -> ChatExample:
    return ChatExample(tuple(Message(role, content) for role, content in turns), SOURCE, first_trained)


def turn(role: str, content: object) -> dict:
    return {"role": role, "content": content}


HELLO = ("user", "Hi"), ("assistant", "Hello")
MEANINGS = [
    ("messages", {"messages": [turn("user", "Hi"), turn("assistant", "Hello")]}, chat(*HELLO)),
    (
        "messages",
        {"messages": [turn("developer", "Terse."), turn("user", "Hi"), turn("tool", "{}")]},
        chat(("system", "Terse."), ("user", "Hi"), ("tool", "{}")),
    ),
    (
        "messages",
        {
            "messages": [
                turn("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i", "image": None}])
            ]
        },
        chat(("user", "Hi")),
    ),
    (
        "messages",
        {"messages": [turn("user", "Hi"), turn("assistant", "Hello") | {"tool_calls": None, "weight": 1}]},
        chat(*HELLO),
    ),
    (
        "messages",
        {"system": "Terse.", "messages": [turn("user", "Hi")]},
        chat(("system", "Terse."), ("user", "Hi")),
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "Terse."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "observation", "value": "{}"},
            ]
        },
        chat(("system", "Terse."), *HELLO, ("tool", "{}")),
    ),
    ("sharegpt", {"conversations": [turn("user", "Hi")], "system": ""}, chat(("user", "Hi"))),
    ("alpaca", {"instruction": "Hi", "output": "Hello"}, chat(*HELLO)),
    ("alpaca", {"instruction": "Hi", "input": None, "output": "Hello"}, chat(*HELLO)),
    ("alpaca", {"instruction": "Hi", "input": " ", "output": "Hello"}, chat(*HELLO)),
    (
        "alpaca",
        {
            "instruction": "Add.",
            "input": "1 2",
            "output": "3",
            "system": "Terse.",
            "history": [["Hi", "Hello"]],
        },
        chat(("system", "Terse."), *HELLO, ("user", "Add.\n\n1 2"), ("assistant", "3")),
    ),
    ("prompt-completion", {"prompt": "1, 2,", "completion": " 3"}, CompletionExample("1, 2,", " 3", SOURCE)),
    (
        "prompt-completion",
        {"prompt": [turn("user", "Hi")], "completion": [turn("assistant", "Hello")]},
        chat(*HELLO, first_trained=1),
    ),
    ("text", {"text": "Once"}, CompletionExample("", "Once", SOURCE)),
]


@pytest.mark.parametrize(("name", "row", "expected"), MEANINGS)
def test_a_row_means_what_its_format_says(name, row, expected):
    assert to_example(row, SOURCE, name) == expected


@pytest.mark.parametrize(("name", "row", "expected"), MEANINGS)
def test_the_format_is_found_by_the_columns_and_told_with_the_reason(name, row, expected):
    detection = detect_format([(SOURCE, row)])
    assert detection.name == name
    assert all(f"`{column}`" in detection.reason for column in FORMATS[name].required)


def test_the_conversation_wins_over_the_flat_text_beside_it_and_the_reason_says_so():
    detection = detect_format([(SOURCE, {"text": "…", "messages": []})])
    assert detection.name == "messages"
    assert "also fits text" in detection.reason


def test_a_filled_column_wins_over_a_column_of_nulls():
    assert detect_format([(SOURCE, {"text": "…", "messages": None})]).name == "text"


def test_every_format_is_read_by_a_task_in_the_order_in_which_the_task_asks():
    assert {"transcript", *EVERY_FORMAT} == set(EVERY_NAME)
    for task in TASKS.values():
        known = EVERY_FORMAT if not task.media else media_formats(task.media)
        assert set(task.formats) <= set(known)
        assert tuple(formats_named(task.formats, task.media)) == task.formats
    assert tuple(FORMATS) == TASKS["sft"].formats


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_config_takes_the_formats_of_its_task_and_no_other(task, name):
    needed = {
        "grpo": "training: {rewards: [format]}",
        "rlhf": "training: {reward_model: judge}",
    }
    text = f"base: tiny\ntask: {task}\ndata: {{train: rows.jsonl, format: {name}}}\n{needed.get(task, '')}\n"
    if name in TASKS[task].formats:
        assert parse_config(text, "soup.yaml").config.data.format == name
        return
    with pytest.raises(ConfigError) as refused:
        parse_config(text, "soup.yaml")
    assert {problem.where for problem in refused.value.problems} == {"soup.yaml:3: data.format"}


TURNS = [turn("user", "Hi"), turn("assistant", "Hello")]
LISTS = {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}
SPELLINGS = [
    {"messages": json.dumps(TURNS)},
    {"messages": f" {json.dumps(TURNS)}\n"},
    {"messages": LISTS},
    {"messages": json.dumps(LISTS)},
    {"messages": LISTS | {"name": None, "tool_calls": [None, None]}},
    {"conversations": json.dumps([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])},
    {"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Hello"]}},
    {"messages": None, "conversations": TURNS, "text": None},
    {"messages": [turn("user", {"type": ["text"], "text": ["Hi"]}), turn("assistant", "Hello")]},
    {"messages": [one | {"from": None, "value": None, "tool_calls": None, "weight": None} for one in TURNS]},
    {"conversations": [{"role": None, "content": None, "from": "human", "value": "Hi"}, TURNS[1]]},
    {"system": None, "tools": None, "messages": TURNS},
    {"instruction": "Hi", "output": "Hello", "input": None, "history": None, "messages": None},
    Cells(instruction="Hi", input="", output="Hello", system="", history="", text=""),
    {"prompt": json.dumps(TURNS[:1]), "completion": json.dumps(TURNS[1:])},
    {"prompt": TURNS[0], "completion": TURNS[1]},
    {"prompt": {"role": ["user"], "content": ["Hi"]}, "completion": json.dumps(TURNS[1])},
]


@pytest.mark.parametrize("row", SPELLINGS)
def test_turns_are_read_however_a_table_holds_them(row):
    example = to_example(row, SOURCE, detect_format([(SOURCE, row)]).name)
    assert example.messages == chat(*HELLO).messages


@pytest.mark.parametrize(
    "text",
    [
        '{"from": "Rome", "to": "Paris"}',
        '[{"role": "admin", "content": "x"}]',
        "[{'value': 3}]",
        '[{"role": "user", "content":',
        "[]",
    ],
)
def test_a_text_that_looks_like_json_stays_a_text(text):
    row = {"prompt": "Well?", "completion": text}
    assert to_example(row, SOURCE, "prompt-completion").completion == text


def test_nulls_that_a_common_schema_fills_in_count_as_absent_and_are_told():
    filled = {"type": "object", "properties": {"day": {"type": "string", "enum": None}, "city": None}}
    call = {
        "id": None,
        "type": "function",
        "function": {"name": "look", "arguments": {"day": "1", "city": None}},
    }
    row = {
        "text": None,
        "tools": [{"type": "function", "function": {"name": "look", "parameters": filled}}],
        "messages": [turn("user", "Hi"), turn("assistant", None) | {"tool_calls": [call]}],
    }
    reader = ExampleReader(iter([(SOURCE, row)] * 2), "auto", "rows.jsonl")
    example, _ = reader
    assert json.loads(example.tools[0])["function"]["parameters"] == {
        "type": "object",
        "properties": {"day": {"type": "string"}},
    }
    assert example.messages[1].calls[0].arguments == '{"day": "1"}'
    assert "12 null values count as absent: `messages` (6), `text` (2), `tools` (4)" in [
        notice.message for notice in reader.notices()
    ]


def test_a_null_in_json_text_of_arguments_and_tools_is_kept():
    tools = [{"name": "look", "parameters": {"type": "object", "default": None}}]
    call = {"name": "look", "arguments": '{"day": null}'}
    row = {"tools": json.dumps(tools), "messages": [turn("assistant", "") | {"tool_calls": [call]}]}
    example = to_example(row, SOURCE, "messages")
    assert example.messages[0].calls[0].arguments == '{"day": null}'
    assert '"default": null' in example.tools[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": None, "messages": TURNS}, "format messages among rows of the format text"),
        (Cells(text="", prompt="a", completion="b"), "format prompt-completion among"),
    ],
)
def test_a_row_of_another_format_is_refused_in_a_table_of_all_columns_too(row, words):
    blank = "" if isinstance(row, Cells) else None
    rows = [(SOURCE, type(row)(dict.fromkeys(row, blank) | {"text": "a"})), (SOURCE, row)]
    with pytest.raises(DataError, match=words) as caught:
        list(ExampleReader(iter(rows), "auto", "rows.csv"))
    assert caught.value.problems[0].code == "mixed-formats"


QUESTION = {"question": "Hi", "answer": "Hello", "id": 3}
NAMES = {"instruction": "question", "output": "answer"}


def test_columns_of_other_names_are_read_by_ours():
    reader = ExampleReader(iter([(SOURCE, QUESTION)]), "auto", "rows.jsonl", columns=NAMES)
    assert [example.messages for example in reader] == [chat(*HELLO).messages]
    assert (reader.detection.name, reader.dropped) == ("alpaca", {"id": 1})


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"prompt": "b", "completion": "a"}, {"prompt": "completion", "completion": "prompt"}, ("a", "b")),
        ({"prompt": "a", "completion": "x", "better": "b"}, {"completion": "better"}, ("a", "b")),
        ({"prompt": "a", "completion": "b"}, {"completion": "answer"}, ("a", "b")),
    ],
)
def test_a_name_that_is_given_away_wins_and_one_that_is_not_there_changes_nothing(row, columns, expected):
    reader = ExampleReader(iter([(SOURCE, row)]), "auto", "rows.jsonl", columns=columns)
    [example] = reader
    assert (example.prompt, example.completion) == expected
    told = {notice.code for notice in reader.notices()}
    assert ("unseen-column" in told) == ("answer" in columns.values())
    assert ("extra-columns" in told) == ("better" in columns.values())


def test_an_error_names_the_column_as_the_file_does():
    rows = [(SOURCE, QUESTION | {"answer": 3})]
    with pytest.raises(DataError) as caught:
        list(ExampleReader(iter(rows), "auto", "rows.jsonl", columns=NAMES))
    assert caught.value.problems[0].where == "rows.jsonl:7: answer"


@pytest.mark.parametrize(
    ("task", "row", "proposed"),
    [
        ("sft", {"question": "a", "answer": "b"}, "{instruction: question, output: answer}"),
        ("sft", {"instruction": "a", "response": "b", "context": "c"}, "{output: response, input: context}"),
        ("sft", {"query": "a", "response": "b"}, "{instruction: query, output: response}"),
        ("sft", {"prompt": "a", "response": "b"}, "{instruction: prompt, output: response}"),
        ("sft", {"input": "a", "output": "b"}, "{instruction: input}"),
        ("sft", {"Input text": "a", "Output": "b"}, '{instruction: "Input text", output: Output}'),
        ("sft", {"conversation": TURNS}, "{messages: conversation}"),
        ("pretrain", {"content": "a"}, "{text: content}"),
        ("grpo", {"question": "a", "answer": "b"}, "{prompt: question}"),
        ("kto", {"question": "a", "answer": "b", "label": 1}, "{instruction: question, output: answer}"),
        ("dpo", {"instruction": "a", "better": "b", "worse": "c"}, "{chosen: better, rejected: worse}"),
        ("embedding", {"text1": "a", "text2": "b"}, "{anchor: text1, positive: text2}"),
    ],
)
def test_columns_of_other_names_are_met_with_the_mapping(task, row, proposed):
    with pytest.raises(DataError) as caught:
        detect_format([(SOURCE, row)], formats_named(TASKS[task].formats))
    assert f"`data.columns: {proposed}`" in caught.value.problems[0].help


def test_an_index_that_pandas_wrote_is_left_out_with_a_note():
    rows = [(SOURCE, {"Unnamed: 0": 4, "__index_level_0__": 4, "text": "a"})]
    reader = ExampleReader(iter(rows), "auto", "rows.csv")
    assert [example.completion for example in reader] == ["a"]
    (notice,) = [one for one in reader.notices() if one.code == "index-column"]
    assert "`Unnamed: 0`, `__index_level_0__`" in notice.message
    assert not reader.dropped


def test_the_table_of_columns_is_that_of_the_formats():
    for name, columns in COLUMNS.items():
        known = EVERY_FORMAT.get(name) or media_formats("audio")[name]
        read = {column for one in (known, *known.variants) for column in one.columns}
        assert read == set(columns), name
    for task in TASKS.values():
        known = formats_named(task.formats, task.media)
        read = {column for one in known.values() for form in (one, *one.variants) for column in form.columns}
        assert task.samples or read == set(task.columns("auto")), task.name


USER = [turn("user", "Hi")]
FAILURES = [
    ("messages", {"messages": "[{'role': 'user', 'content': 'Hi'}]"}, "bad-json", ": messages", "not JSON"),
    ("messages", {"messages": '[{"role": "user"'}, "bad-json", ": messages", "not JSON"),
    (
        "messages",
        {"messages": {"role": ["user"], "content": []}},
        "ragged-lists",
        ": messages",
        "`content` 0",
    ),
    ("messages", {"messages": USER[0]}, "mistyped-field", ": messages", "got an object"),
    (
        "prompt-completion",
        {"prompt": "[{'role': 'user', 'content': 'Hi'}]", "completion": "a"},
        "bad-json",
        ": prompt",
        "not JSON",
    ),
    ("alpaca", Cells(instruction="a", output="b", history="c"), "mistyped-field", ": history", "got text"),
    ("alpaca", {"instruction": "a", "output": "b", "history": "[["}, "bad-json", ": history", "not JSON"),
    ("text", {"text": None}, "null-field", ": text", "got null"),
    ("text", {"text": 3}, "mistyped-field", ": text", "got a number"),
    ("text", {"text": "\ud800"}, "broken-text", ": text", "surrogate"),
    ("text", {"txet": "a"}, "missing-field", ": text", "found `txet`"),
    ("alpaca", {"text": "a"}, "mixed-formats", "", "format text among rows of the format alpaca"),
    ("alpaca", {"instruction": "a", "output": None}, "null-field", ": output", "got null"),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "input": True},
        "mistyped-field",
        ": input",
        "got a boolean",
    ),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": "c"},
        "mistyped-field",
        ": history",
        "got text",
    ),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "mistyped-field",
        ": history[0]",
        "pair",
    ),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["c", 1]]},
        "mistyped-field",
        ": history[0]",
        "texts",
    ),
    ("messages", {"messages": "Hi"}, "mistyped-field", ": messages", "got text"),
    ("messages", {"messages": ["Hi"]}, "mistyped-field", ": messages[0]", "got text"),
    ("messages", {"messages": [{"content": "Hi"}]}, "missing-field", ": messages[0].role", "`content`"),
    ("messages", {"messages": [{"role": "user"}]}, "missing-field", ": messages[0].content", "`role`"),
    (
        "messages",
        {"messages": [*USER, turn("assistant", None)]},
        "null-field",
        ": messages[1].content",
        "null",
    ),
    ("messages", {"messages": [turn(3, "Hi")]}, "mistyped-field", ": messages[0].role", "number"),
    ("messages", {"messages": [turn("asistant", "Hi")]}, "unknown-role", ": messages[0].role", "`asistant`"),
    (
        "messages",
        {"messages": [turn("user", [{"type": "image", "url": "x"}])]},
        "unsupported-content",
        ": messages[0].content[0]",
        "`image`",
    ),
    (
        "messages",
        {"messages": [turn("user", ["Hi"])]},
        "mistyped-field",
        ": messages[0].content[0]",
        "got text",
    ),
    (
        "messages",
        {"messages": [turn("user", "a") | {"thinking": "Hm."}]},
        "misplaced-thought",
        ": messages[0]",
        "`thinking`",
    ),
    (
        "messages",
        {"messages": [*USER, turn("assistant", "a") | {"thinking": "Hm.", "reasoning": "Oh."}]},
        "contradicting-keys",
        ": messages[1]",
        "`reasoning` and `thinking`",
    ),
    (
        "messages",
        {"messages": [turn("user", "a") | {"train": True}]},
        "weighted-prompt",
        ": messages[0]",
        "`train`",
    ),
    (
        "messages",
        {"messages": [*USER, turn("assistant", "a") | {"weight": -1}]},
        "weight-range",
        ": messages[1].weight",
        "got -1",
    ),
    (
        "messages",
        {"messages": [*USER, turn("assistant", "a") | {"loss": "no"}]},
        "mistyped-field",
        ": messages[1].loss",
        "true or false",
    ),
    (
        "messages",
        {"messages": [*USER, turn("assistant", "a") | {"weight": 0, "train": True}]},
        "contradicting-keys",
        ": messages[1]",
        "`weight` and `train`",
    ),
    (
        "messages",
        {"system": "a", "messages": [turn("system", "b")]},
        "two-system-prompts",
        ": system",
        "already",
    ),
    (
        "prompt-completion",
        {"prompt": "a", "completion": USER},
        "mistyped-field",
        ": completion",
        "as the prompt",
    ),
    (
        "prompt-completion",
        {"prompt": USER, "completion": "a"},
        "mistyped-field",
        ": completion",
        "list of turns",
    ),
    ("preference", {"chosen": "a"}, "unsupported-format", "", "`preference`"),
]


@pytest.mark.parametrize(("name", "row", "code", "place", "words"), FAILURES)
def test_a_wrong_field_is_named_with_file_and_line(name, row, code, place, words):
    with pytest.raises(DataError) as caught:
        to_example(row, SOURCE, name)
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == (code, f"rows.jsonl:7{place}")
    assert words in problem.message


def test_a_misspelled_role_is_met_with_the_right_one():
    with pytest.raises(DataError, match="did you mean `assistant`"):
        to_example({"messages": [turn("Asistant", "Hi")]}, SOURCE, "messages")


def test_unknown_columns_are_listed_with_the_known_formats():
    with pytest.raises(DataError) as caught:
        detect_format([(SOURCE, {"question": "a", "answer": "b"})])
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == ("unknown-columns", "rows.jsonl:7")
    assert "`question`, `answer`" in problem.message
    assert all(name in problem.help for name in FORMATS)


def test_preference_rows_are_told_apart_from_unknown_ones():
    with pytest.raises(DataError, match="preference rows"):
        detect_format([(SOURCE, {"prompt": "a", "chosen": "b", "rejected": "c"})])


def test_columns_and_keys_that_nothing_is_made_of_are_listed():
    row = {"messages": [turn("user", "Hi") | {"name": "Ann"}], "id": 3, "source": None}
    assert extra_columns(row, "messages") == ["id", "messages[].name"]


def test_a_reader_counts_rows_and_dropped_columns():
    rows = [
        (SOURCE, {"text": "a", "id": 1}),
        (SOURCE, {"text": "b"}),
        (SOURCE, {"text": "c", "id": 2, "x": 3}),
    ]
    reader = ExampleReader(iter(rows), "auto", "rows.jsonl")
    assert [example.completion for example in reader] == ["a", "b", "c"]
    assert (reader.count, reader.dropped) == (3, {"id": 2, "x": 1})
    assert [notice.code for notice in reader.notices()] == ["data-format", "extra-columns"]


def test_a_row_of_another_format_in_the_middle_stops_the_reader():
    rows = [(SOURCE, {"text": "a"}), (Source("rows.jsonl", 8), {"instruction": "a", "output": "b"})]
    with pytest.raises(DataError, match="among rows of the format text") as caught:
        list(ExampleReader(iter(rows), "auto", "rows.jsonl"))
    assert caught.value.problems[0].where == "rows.jsonl:8"


DRAWN = [
    "text",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "messages",
    "tools",
]
KEYS = [
    "role",
    "content",
    "from",
    "value",
    "type",
    "text",
    "tool_calls",
    "weight",
    "function",
    "name",
    "arguments",
]
LEAF = (
    st.none()
    | st.booleans()
    | st.integers(0, 2)
    | st.sampled_from(["user", "assistant", "system", "text", ""])
    | st.text(max_size=5)
)
VALUE = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=500, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*DRAWN, "conversations"]), VALUE, max_size=5),
    st.sampled_from(["auto", *FORMATS]),
)
def test_whatever_the_row_it_is_an_example_or_a_data_error_with_its_place(row, name):
    try:
        [example] = ExampleReader(iter([(SOURCE, row)]), name, "rows.jsonl")
    except DataError as error:
        assert error.problems[0].where.startswith("rows.jsonl:7")
    else:
        assert isinstance(example, (ChatExample, CompletionExample))
