"""Opening a tokenizer, plain texts, prompts, end tokens, and chat templates that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from soup_xb.core.errors import ConfigError, DataError, ModelError
from soup_xb.core.rows.examples import ChatExample, CompletionExample, Message, Source
from soup_xb.data.tokenizer import open_tokenizer

TEMPLATES = Path(__file__).with_name("chat_templates")
SOURCE = Source("rows.jsonl", 3)
CHAT = ChatExample((Message("user", "Paris?"), Message("assistant", "yes")), SOURCE)


def copied(base: Path, folder: Path, **files: object) -> Path:
    """A base's folder with files replaced: text as it is, anything else as JSON."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, "utf-8")
    return folder


def failure(base: Path, template: str | None = None) -> tuple[str, str]:
    with pytest.raises((ModelError, ConfigError)) as caught:
        open_tokenizer(base, template)
    return caught.value.problems[0].code, caught.value.problems[0].message


def test_a_plain_text_begins_and_ends_as_the_tokenizer_says_and_the_end_is_trained(opened):
    tokenizer = opened("sentence-piece", None)
    (row,) = tokenizer.tokenize(CompletionExample("", "The capital", SOURCE), 100).row.sequences
    assert tokenizer.decode(row.tokens, special=True) == "<s> The capital</s>"
    assert row.trained.tolist() == [False] + [True] * (row.length - 1)
    assert (tokenizer.prefix, opened("byte-level", None).prefix) == ((0,), ())


def test_without_a_begin_token_the_first_token_is_no_target(opened):
    (row,) = (
        opened("byte-level", None).tokenize(CompletionExample("", "The capital", SOURCE), 100).row.sequences
    )
    assert row.trained.tolist() == [False] + [True] * (row.length - 1)


@pytest.mark.parametrize("kind", ["byte-level", "llama3-like", "sentence-piece"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("The cap", "ital"),
        ("capital of", " France"),
        ("capital of ", "France"),
        ("yes\n", "\nno"),
        ("é", "😀"),
        ("", "Rome"),
    ],
)
def test_no_token_crosses_from_prompt_to_completion(opened, kind, prompt, completion):
    tokenizer = opened(kind, None)
    (row,) = tokenizer.tokenize(CompletionExample(prompt, completion, SOURCE), 100).row.sequences
    first = row.trained.tolist().index(True)
    if prompt:
        assert row.tokens[:first].tolist() == tokenizer.text_ids(prompt).tolist()
        assert row.trained[first:].all()
        if completion[0] != " " or kind != "sentence-piece":
            assert tokenizer.decode(row.tokens[first:], special=True) == completion + "</s>"
    assert tokenizer.decode(row.tokens) == prompt + completion


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (CompletionExample("", " \n", SOURCE), "the text is empty"),
        (CompletionExample("a", "", SOURCE), "the completion is empty"),
    ],
)
def test_an_empty_text_has_nothing_to_learn(opened, example, reason):
    done = opened("byte-level", None).tokenize(example, 100)
    assert (done.row, done.reason) == (None, reason)


def test_many_examples_become_the_rows_of_each_alone_in_order(opened):
    tokenizer = opened("llama3-like", "llama3")
    examples = [
        CHAT,
        CompletionExample("a", "b", SOURCE),
        ChatExample((Message("user", "?"),), SOURCE),
        ChatExample((*CHAT.messages, Message("user", "é"), Message("assistant", "\n\n1")), SOURCE),
    ]
    together = tokenizer.tokenize_many(examples, 50)
    for example, one in zip(examples, together, strict=True):
        alone = tokenizer.tokenize(example, 50)
        assert one.reason == alone.reason
        assert (one.row is None) == (alone.row is None)
        if one.row is not None:
            (mine,), (other,) = one.row.sequences, alone.row.sequences
            assert mine.tokens.tolist() == other.tokens.tolist()
            assert mine.trained.tolist() == other.trained.tolist()


def test_a_padding_and_truncating_tokenizer_file_changes_nothing(bases, tmp_path):
    folder = copied(bases["byte-level"], tmp_path / "base")
    written = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    written["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    written["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer.json").write_text(json.dumps(written), "utf-8")
    text = "What is the capital of France?"
    assert (
        open_tokenizer(folder).text_ids(text).tolist()
        == open_tokenizer(bases["byte-level"]).text_ids(text).tolist()
    )


def test_end_ids_are_eos_the_generation_config_s_list_and_the_template_s_end_of_turn(bases, tmp_path):
    folder = copied(
        bases["byte-level"], tmp_path / "base", generation_config__json={"eos_token_id": [2, 7, 1]}
    )
    tokenizer = open_tokenizer(folder, str(TEMPLATES / "chatml.jinja"))
    assert tokenizer.end_ids == (1, 2, 7, tokenizer.hf.convert_tokens_to_ids("<|im_end|>"))
    assert open_tokenizer(bases["byte-level"]).end_ids == (1,)
    assert tokenizer.pad_id == 2


@pytest.mark.parametrize("content", ["[]", "{", '{"eos_token_id": "a"}', '{"eos_token_id": [true]}'])
def test_a_broken_generation_config_is_named(bases, tmp_path, content):
    folder = copied(bases["byte-level"], tmp_path / "base", generation_config__json=content)
    assert failure(folder)[0] == "base-config"


def test_a_base_without_padding_pads_with_its_end_token(bases, tmp_path):
    folder = copied(bases["byte-level"], tmp_path / "base")
    written = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    del written["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(written), "utf-8")
    assert open_tokenizer(folder).pad_id == 1


def test_a_prompt_ends_where_the_answer_begins(opened):
    tokenizer = opened("byte-level", "chatml")
    ids = tokenizer.prompt_ids([Message("user", "Paris?")])
    assert ids.dtype == np.int32
    assert (
        tokenizer.decode(ids, special=True) == "<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(ids) == "user\nParis?\nassistant\n"


def test_a_refused_prompt_says_why(opened):
    with pytest.raises(DataError, match="System role not supported"):
        opened("byte-level", "gemma").prompt_ids([Message("system", "a")])


def test_conversations_on_a_base_without_a_template_are_refused_with_the_way_out(opened):
    tokenizer = opened("byte-level", None)
    assert not tokenizer.has_chat_template
    for attempt in (lambda: tokenizer.tokenize(CHAT, 100), lambda: tokenizer.prompt_ids(CHAT.messages)):
        with pytest.raises(ModelError) as caught:
            attempt()
        assert caught.value.problems[0].code == "no-chat-template"
        assert "data.chat_template" in caught.value.problems[0].help


def test_a_saved_tokenizer_carries_the_template_in_use(opened, tmp_path):
    tokenizer = opened("byte-level", "llama3")
    tokenizer.save(tmp_path)
    again = open_tokenizer(tmp_path)
    assert again.prompt_ids(CHAT.messages[:1]).tolist() == tokenizer.prompt_ids(CHAT.messages[:1]).tolist()
    assert again.end_ids == tokenizer.end_ids


def test_a_template_given_as_text_wins_over_the_base_s_own(opened, bases, tmp_path):
    opened("byte-level", "llama3").save(tmp_path)
    tokenizer = open_tokenizer(tmp_path, "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert tokenizer.decode(tokenizer.prompt_ids(CHAT.messages), special=True) == "[Paris?][yes]"


def test_a_template_without_end_tokens_and_one_with_a_date_are_told(opened, bases):
    assert [notice.code for notice in opened("byte-level", "plain_words").notices()] == ["no-end-token"]
    dated = open_tokenizer(
        bases["byte-level"],
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    )
    assert [notice.code for notice in dated.notices()] == ["dated-template"]
    assert list(opened("byte-level", "chatml").notices()) == []


def test_end_marks_in_ordinary_words_are_trained_to_their_last_letter(bases):
    tokenizer = open_tokenizer(
        bases["byte-level"], "{% for m in messages %}{{ m.role }}: {{ m.content }} ##END##\n{% endfor %}"
    )
    messages = (*CHAT.messages, Message("user", "no"))
    (row,) = tokenizer.tokenize(ChatExample(messages, SOURCE), 100).row.sequences
    assert tokenizer.decode(row.tokens[row.trained]) == "assistant: yes ##END##"
    assert tokenizer.turn_end == "##END##"


def test_an_end_mark_that_differs_from_turn_to_turn_is_never_trained_in_part(bases):
    tokenizer = open_tokenizer(
        bases["byte-level"],
        "{% for m in messages %}{{ m.content }}{{ ' ##DONE##' if loop.last else ' ##NEXT##' }}{% endfor %}",
    )
    messages = (*CHAT.messages, Message("user", "?"), Message("assistant", "no"))
    (row,) = tokenizer.tokenize(ChatExample(messages, SOURCE), 200).row.sequences
    assert tokenizer.decode(row.tokens, special=True) == "Paris? ##NEXT##yes ##NEXT##? ##NEXT##no ##DONE##"
    assert tokenizer.decode(row.tokens[row.trained]) == "yesno ##DONE##"


@pytest.mark.parametrize(
    ("template", "code", "words"),
    [
        ("{% for m in messages %}", "bad-chat-template", "line 1"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "bad-chat-template", "too deep"),
        ("{{ messages | nosuchfilter }}", "bad-chat-template", "nosuchfilter"),
        ("{{ 1 }}" + "a" * 300_000, "chat-template-too-large", "256.0 KiB"),
        ("no-such-file.jinja", "chat-template-file", "No such file"),
        ("a\0b", "chat-template-file", "null"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_before_any_row(bases, template, code, words):
    found, message = failure(bases["byte-level"], template)
    assert found == code
    assert words in message


def test_a_template_file_that_is_too_large_or_not_utf8_is_refused(bases, tmp_path):
    (tmp_path / "large.jinja").write_text("{{ 1 }}" + "a" * 300_000)
    (tmp_path / "latin.jinja").write_bytes(b"{{ 1 }}\xe9")
    assert failure(bases["byte-level"], str(tmp_path / "large.jinja"))[0] == "chat-template-too-large"
    assert failure(bases["byte-level"], str(tmp_path / "latin.jinja"))[0] == "chat-template-file"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__ }}{% for m in messages %}{{ m.content }}{% endfor %}", "unsafe"),
        ("{% for i in range(100000) %}{{ 'abcdefghijklmnopqrstuvwxyz' }}{% endfor %}", "far longer"),
        ("{{ messages[0].content / 2 }}", "unsupported operand"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages[7].content.x }}", "undefined|no element"),
    ],
)
def test_a_template_that_misbehaves_fails_the_row_in_its_own_words(bases, template, words):
    tokenizer = open_tokenizer(bases["byte-level"], template)
    with pytest.raises(DataError, match=words) as caught:
        tokenizer.tokenize(CHAT, 100)
    assert caught.value.problems[0].where == "rows.jsonl:3"


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"tokenizer__json": "{}"}, "broken-tokenizer"),
        ({"tokenizer__json": ""}, "broken-tokenizer"),
        ({"tokenizer__json": '{"added_tokens": [], "model": {"type": "BPE"}}'}, "broken-tokenizer"),
        ({"tokenizer_config__json": "{"}, "broken-tokenizer"),
        ({"tokenizer_config__json": "[]"}, "broken-tokenizer"),
        (
            {
                "tokenizer_config__json": {
                    "auto_map": {"AutoTokenizer": ["own.Own", None]},
                    "tokenizer_class": "Own",
                }
            },
            "remote-code",
        ),
    ],
)
def test_a_broken_or_foreign_tokenizer_is_refused(bases, tmp_path, files, code):
    assert failure(copied(bases["byte-level"], tmp_path / "base", **files))[0] == code


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert failure(tmp_path)[0] == "no-tokenizer"
