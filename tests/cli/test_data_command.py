"""`soupx data` from the outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOUPX = [sys.executable, "-m", "soup_xb"]


def outside(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SOUPX, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"},
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [("user", "Hi"), ("assistant", "Hello \x1b[31m!"), ("user", "Bye"), ("assistant", "Good bye.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    written = [{"messages": messages, "id": 1}, {"messages": messages[:1]}, {"messages": messages[:2]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in written), "utf-8")
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return tiny_llama


def test_without_a_base_format_and_rows_are_shown_and_no_tokenizer_is_needed(rows):
    done = outside("data", rows)
    assert done.returncode == 0, done.stderr
    assert "format            messages (the first row has the column `messages`)" in done.stdout
    assert "rows              3" in done.stdout
    assert "`id` (in 1)" in done.stdout
    assert "tokens" not in done.stdout


def test_without_a_base_no_framework_is_imported(rows):
    code = (
        "import sys; from click.testing import CliRunner; from soup_xb.cli.data import command;"
        f"result = CliRunner().invoke(command, [{str(rows)!r}]); assert result.exit_code == 0, result.output;"
        "print({'torch', 'transformers', 'datasets', 'pyarrow', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_with_a_base_tokens_are_counted_and_the_trained_ones_marked(soupx, rows, base):
    done = soupx("data", rows, "--base", base)
    assert done.code == 0, done.err
    assert "trained rows      2" in done.out
    assert "nothing to learn  1" in done.out
    assert "█" in done.out
    example = done.out.split("between ‹ and ›:\n\n")[1]
    assert example == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n‹Hello \\x1b[31m!<|im_end|>›\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n‹Good bye.<|im_end|>›\n\n"
    )
    assert "rows.jsonl:2 (no assistant turn)" in done.out


def test_the_json_is_one_object_on_stdout_whose_numbers_agree(rows, base):
    done = outside("data", rows, "--base", base, "--max-length", 60, "--json")
    summary = json.loads(done.stdout)
    assert (summary["format"], summary["rows"], summary["trained_rows"]) == ("messages", 3, 2)
    assert (summary["nothing_to_learn"], summary["truncated"]) == (1, 1)
    assert sum(bar["rows"] for bar in summary["lengths"]["histogram"]) == summary["trained_rows"]
    assert summary["lengths"]["longest"] == 60
    trained = [piece["text"] for piece in summary["example"]["pieces"] if piece["trained"]]
    assert trained[0] == "Hello \x1b[31m!<|im_end|>"
    assert {notice["code"] for notice in summary["notices"]} >= {"data-format", "truncated", "extra-columns"}


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code"),
    [
        (("missing.jsonl",), 3, "error[data-missing]"),
        (("ROWS", "--format", "alpaca"), 3, "error[mixed-formats]"),
        (("ROWS", "--base", "no/such/folder/at/all"), 4, "error[base-not-found]"),
        (("ROWS", "--base", "BASE", "--chat-template", "{% if %}"), 4, "error[bad-chat-template]"),
        (("ROWS", "--base", "BASE", "--max-length", "8"), 3, "error[nothing-to-learn]"),
        (("ROWS", "--max-length", "1"), 2, "error[usage]"),
    ],
)
def test_a_failure_is_one_message_and_its_exit_code(soupx, rows, base, arguments, exit_code, code):
    done = soupx("data", *(str({"ROWS": rows, "BASE": base}.get(name, name)) for name in arguments))
    assert done.code == exit_code, done.err
    assert code in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("with_base", [False, True])
def test_columns_of_other_names_are_shown_as_they_are_trained_on(soupx, tmp_path, base, with_base):
    (tmp_path / "qa.csv").write_text(";question;answer\n0;Where?;Here, or there.\n", "utf-8")
    names = ("--columns", "instruction=question,output=answer")
    options = ("--base", base) if with_base else ()
    done = soupx("data", tmp_path / "qa.csv", *names, *options, "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert (summary["format"], summary["rows"]) == ("alpaca", 1)
    assert "index-column" in {notice["code"] for notice in summary["notices"]}
    if with_base:
        trained = [piece["text"] for piece in summary["example"]["pieces"] if piece["trained"]]
        assert trained == ["Here, or there.<|im_end|>"]


def test_the_rows_of_a_task_are_read_as_it_reads_them(soupx, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n', "utf-8")
    assert "anchor-positive" in soupx("data", tmp_path / "rows.jsonl", "--task", "embedding").out
    done = soupx("data", tmp_path / "rows.jsonl", "--task", "sft")
    assert done.code == 3
    assert "data.columns: {instruction: question, output: answer}" in done.err
    assert soupx("data", tmp_path / "rows.jsonl", "--columns", "question").code == 2


def test_the_calls_and_answers_of_a_row_with_tools_are_shown_as_trained(soupx, tmp_path, base):
    template = (
        "{{ tools[0] | tojson if tools }}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    row = {
        "tools": [{"name": "look", "description": "Look.", "parameters": {"type": "object"}}],
        "messages": [
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"at": "shelf"}}]},
            {"role": "tool", "content": "a book"},
            {"role": "assistant", "content": "On the shelf."},
        ],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    done = soupx("data", tmp_path / "rows.jsonl", "--base", base, "--chat-template", template)
    assert done.code == 0, done.err
    assert (
        "<|im_start|>assistant ‹{"
        '"name": "look", "arguments": {"at": "shelf"}}<|im_end|>›<|im_start|>tool a book<|im_end|>'
        "<|im_start|>assistant ‹On the shelf.<|im_end|>›"
    ) in done.out
