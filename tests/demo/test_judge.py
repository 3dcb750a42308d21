"""The judge of the demo's answer format, and the shipped data."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from soup_xb.demo.trial import passes, score

GOOD = "In short: Ice floats.\nBecause: It is less dense.\nTry this: Freeze a full bottle."


def shipped(name: str) -> list[dict]:
    text = (files("soup_xb.demo") / "data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Ice floats because it is less dense. Try this: freeze a bottle.",
        "In short: Ice floats.\nBecause: It is less dense.",
        "Because: It is less dense.\nIn short: Ice floats.\nTry this: Freeze a full bottle.",
        GOOD.replace("In short:", "in short:"),
        GOOD.replace("\n", "\n\n"),
        GOOD.replace("\n", " "),
        GOOD + "\nAnd more.",
        GOOD + "\n" + GOOD,
        "Sure!\n" + GOOD,
        GOOD.removesuffix(" bottle."),
        GOOD.replace("Ice floats.", "Yes."),
        GOOD.replace("It is less dense.", "Ice floats."),
        GOOD.replace("Because: It is less dense.", "Because: "),
    ],
)
def test_an_answer_that_misses_the_format_in_one_way_fails(answer: str) -> None:
    assert not passes(answer)


def test_three_labelled_sentences_pass_with_or_without_a_final_newline() -> None:
    assert passes(GOOD)
    assert passes(GOOD + "\n")
    assert score([GOOD, "no", GOOD]) == 2


def test_every_shipped_row_has_one_question_and_one_answer_in_the_format() -> None:
    rows = shipped("train.jsonl")
    assert len(rows) >= 200
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert passes(row["messages"][1]["content"]), row


def test_no_held_out_prompt_is_in_the_data() -> None:
    questions = [row["messages"][0]["content"].casefold() for row in shipped("train.jsonl")]
    prompts = [row["prompt"].casefold() for row in shipped("prompts.jsonl")]
    assert len(prompts) == len(set(prompts)) == 20
    assert len(questions) == len(set(questions))
    assert not set(prompts) & set(questions)
