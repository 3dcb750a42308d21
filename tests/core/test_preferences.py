"""Preference rows: how they are written, what they become, and which rows meet in a micro-batch."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from soup_xb.core.config.load import parse_config
from soup_xb.core.errors import ConfigError, DataError
from soup_xb.core.rows.batches import collate_rows, sequence_batches
from soup_xb.core.rows.examples import Message, Source
from soup_xb.core.rows.formats.detect import ExampleReader
from soup_xb.core.rows.formats.every import formats_named
from soup_xb.core.rows.judged import learned_rows
from soup_xb.core.rows.row import Row, TokenSequence
from soup_xb.core.rows.table import Rows
from soup_xb.core.run.reference import Reference, read_reference, reference_key, write_reference
from soup_xb.core.tasks import TASKS

SOURCE = Source("rows.jsonl", 7)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASK, YES, NO = turn("user", "Well?"), turn("assistant", "Yes."), turn("assistant", "No.")


def read(row: dict[str, Any], task: str = "dpo", name: str = "auto") -> Any:
    formats = formats_named(TASKS[task].formats)
    [example] = ExampleReader(iter([(SOURCE, row)]), name, "rows.jsonl", formats)
    return example


def side(prompt: list[int], answer: list[int]) -> TokenSequence:
    marks = [False] * len(prompt) + [True] * len(answer)
    return TokenSequence(prompt + answer, marks, Source("rows.jsonl", 1))


def pairs(count: int = 6) -> tuple[Row, ...]:
    return tuple(
        Row("pair", (side([10 + index, 5], [20 + index] * (index + 1)), side([10 + index, 5], [40 + index])))
        for index in range(count)
    )


def judged(rows: tuple[Row, ...], task: str, max_length: int) -> Rows:
    return learned_rows(rows, TASKS[task].kind, max_length, TASKS[task].needs_mismatched)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
        {"chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"prompt": "Well?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
    ],
    ids=["prompt as turns", "whole conversations", "the prompt told twice"],
)
def test_conversations_are_trained_on_from_where_their_sides_part(row: dict[str, Any]) -> None:
    example = read(row)
    for side, answer in ((example.chosen, "Yes."), (example.rejected, "No.")):
        assert side.messages == (Message("user", "Well?"), Message("assistant", answer))
        assert side.first_trained == 1


HH = "\n\nHuman: Well?\n\nAssistant: Oh.\n\nHuman: Say.\n\nAssistant:"
OH, SAY = turn("assistant", "Oh."), turn("user", "Say.")
ASKED = (Message("user", "Well?"),)


@pytest.mark.parametrize(
    ("row", "before"),
    [
        (
            {
                "conversations": [{"from": "human", "value": "Well?"}],
                "chosen": {"from": "gpt", "value": "Yes."},
                "rejected": {"from": "gpt", "value": "No."},
            },
            ASKED,
        ),
        ({"messages": [ASK], "chosen": YES, "rejected": NO}, ASKED),
        ({"messages": [ASK], "chosen": "Yes.", "rejected": "No."}, ASKED),
        ({"messages": [ASK, YES], "chosen": [ASK, YES], "rejected": [ASK, NO]}, ASKED),
        ({"instruction": "Well?", "input": "", "chosen": "Yes.", "rejected": "No."}, ASKED),
        (
            {"system": "Terse.", "instruction": "Well?", "input": None, "chosen": "Yes.", "rejected": "No."},
            (Message("system", "Terse."), *ASKED),
        ),
        (
            {"instruction": "Say.", "history": [["Well?", "Oh."]], "chosen": "Yes.", "rejected": "No."},
            (*ASKED, Message("assistant", "Oh."), Message("user", "Say.")),
        ),
        ({"prompt": "Well?", "chosen": YES, "rejected": NO}, ASKED),
        ({"prompt": "Well?", "chosen": [YES], "rejected": [NO]}, ASKED),
        ({"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]}, ASKED),
        (
            {"prompt": "Well?", "messages": [ASK, YES], "chosen": [ASK, YES], "rejected": [ASK, NO]},
            ASKED,
        ),
        (
            {"chosen": [ASK, OH, SAY, YES], "rejected": [ASK, OH, SAY, NO]},
            (*ASKED, Message("assistant", "Oh."), Message("user", "Say.")),
        ),
        (
            {"chosen": f"{HH} Yes.", "rejected": f"{HH} No."},
            (*ASKED, Message("assistant", "Oh."), Message("user", "Say.")),
        ),
        (
            {"prompt": HH, "chosen": f"{HH} Yes.", "rejected": f"{HH} No."},
            (*ASKED, Message("assistant", "Oh."), Message("user", "Say.")),
        ),
        ({"chosen": json.dumps([ASK, YES]), "rejected": json.dumps([ASK, NO])}, ASKED),
    ],
)
def test_pairs_of_other_tools_are_conversations_that_part_at_the_answers(
    row: dict[str, Any], before: tuple[Message, ...]
) -> None:
    example = read(row)
    for side, answer in ((example.chosen, "Yes."), (example.rejected, "No.")):
        assert side.messages == (*before, Message("assistant", answer))
        assert side.first_trained == len(before)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, YES], "label": True},
        {
            "conversations": [{"from": "human", "value": "Well?"}, {"from": "gpt", "value": "Yes."}],
            "kto_tag": True,
        },
        {"instruction": "Well?", "output": "Yes.", "kto_tag": "True"},
        {"prompt": [ASK], "completion": YES, "label": "true"},
        {"prompt": [ASK], "completion": [YES], "label": 1},
        {"prompt": [ASK], "completion": [YES], "label": " 1 "},
    ],
)
def test_judged_rows_of_other_tools_have_their_last_turn_judged(row: dict[str, Any]) -> None:
    example = read(row, "kto")
    assert example.answer.messages == (*ASKED, Message("assistant", "Yes."))
    assert (example.answer.first_trained, example.desirable) == (1, True)


@pytest.mark.parametrize("label", [False, 0, 0.0, "False", "false", "0", "FALSE"])
def test_a_bad_answer_may_be_labelled_as_tables_do(label: Any) -> None:
    assert read({"prompt": "1+1=", "completion": "3", "label": label}, "bco").desirable is False


def test_a_pair_without_a_prompt_is_told_which_column_may_be_it() -> None:
    with pytest.raises(DataError, match=r"data\.columns: {instruction: question}"):
        read({"question": "a", "chosen": "b", "rejected": "c"})


def test_texts_have_their_prompt_before_both_answers() -> None:
    example = read({"prompt": "1+1=", "chosen": "2", "rejected": "3"})
    assert (example.chosen.prompt, example.chosen.completion) == ("1+1=", "2")
    assert (example.rejected.prompt, example.rejected.completion) == ("1+1=", "3")


def test_an_answer_with_a_verdict_is_one_example() -> None:
    example = read({"prompt": "1+1=", "completion": "3", "label": False}, "kto")
    assert (example.answer.completion, example.desirable) == ("3", False)


FAILURES = [
    ("dpo", {"prompt": "a", "completion": "b", "label": True}, "unpaired-rows"),
    ("dpo", {"messages": [ASK, YES]}, "unknown-columns"),
    ("sft", {"chosen": [ASK, YES], "rejected": [ASK, NO]}, "preference-rows"),
    ("dpo", {"chosen": [ASK, YES], "rejected": [turn("user", "Oh?"), NO]}, "no-shared-prompt"),
    ("dpo", {"chosen": [YES], "rejected": [NO]}, "no-shared-prompt"),
    ("dpo", {"prompt": "Else?", "chosen": [ASK, YES], "rejected": [ASK, NO]}, "other-prompt"),
    ("dpo", {"chosen": "a", "rejected": "b"}, "missing-field"),
    ("dpo", {"prompt": "a", "chosen": "b", "rejected": [NO]}, "mistyped-field"),
    ("dpo", {"prompt": [ASK], "chosen": "b", "rejected": "c"}, "mistyped-field"),
    ("dpo", {"prompt": "a", "chosen": None, "rejected": "c"}, "null-field"),
    ("kto", {"prompt": "a", "completion": "b", "label": 2}, "mistyped-field"),
    ("kto", {"prompt": "a", "completion": "b", "label": "maybe"}, "mistyped-field"),
    ("kto", {"prompt": "a", "completion": "b", "label": None}, "null-field"),
    ("dpo", {"messages": [ASK, YES], "kto_tag": True}, "unpaired-rows"),
    ("dpo", {"question": "a", "chosen": "b", "rejected": "c"}, "missing-field"),
    ("dpo", {"conversations": "Well?", "chosen": YES, "rejected": NO}, "mistyped-field"),
    ("dpo", {"prompt": "a", "chosen": {"role": "asistant", "content": "b"}, "rejected": NO}, "unknown-role"),
    ("kto", {"prompt": "a", "completion": "b"}, "unknown-columns"),
]


@pytest.mark.parametrize(("task", "row", "code"), FAILURES)
def test_a_row_of_another_kind_is_an_error_with_its_place(task: str, row: dict[str, Any], code: str) -> None:
    with pytest.raises(DataError) as caught:
        read(row, task)
    problem = caught.value.problems[0]
    assert problem.code == code
    assert problem.where.startswith("rows.jsonl:7")


def test_judging_tasks_take_the_two_sides_of_a_pair_one_by_one() -> None:
    rows = judged(pairs(2), "bco", 100)
    assert {(row.kind, len(row.sequences)) for row in rows} == {("judged", 1)}
    assert [(row.sequences[0].tokens[-1], row.extra) for row in rows] == [
        (20, True), (40, False), (21, True), (41, False),
    ]  # fmt: skip


def test_kto_measures_drift_on_answers_to_other_prompts() -> None:
    for row in judged(pairs(3), "kto", 100):
        answer, mismatched = row.sequences
        assert row.kind == "judged"
        np.testing.assert_array_equal(mismatched.prompt, answer.prompt)
        mine, other = int(answer.tokens[0]) - 10, int(mismatched.tokens[-1]) % 20
        assert mine != other
    alone = judged(pairs(1), "kto", 3)
    assert [int(row.sequences[1].tokens[-1]) for row in alone] == [40, 20]


def test_a_micro_batch_holds_all_chosen_and_then_all_rejected_answers() -> None:
    rows = pairs(3)
    batch = collate_rows(rows, np.arange(6.0).reshape(3, 2), 0)
    assert [int(tokens[2]) for tokens in batch.tokens] == [20, 21, 22, 40, 41, 42]
    assert batch.weights.sum(axis=1).tolist() == [1, 2, 3, 1, 1, 1]
    assert batch.constants["reference"].tolist() == [0, 2, 4, 1, 3, 5]
    assert batch.counted.tolist() == [1, 1, 1]


def test_judged_answers_know_their_verdict_and_their_mismatched_ones_stand_beside_them() -> None:
    rows = judged(pairs(2), "kto", 100)
    batch = collate_rows(list(rows), np.arange(8.0).reshape(4, 2), 0)
    assert batch.constants["desirable"].tolist() == [True, False, True, False]
    assert batch.constants["reference"].tolist() == [0, 2, 4, 6]
    assert batch.beside is not None
    assert batch.beside.constants["reference"].tolist() == [1, 3, 5, 7]
    assert [int(tokens[0]) for tokens in batch.beside.tokens] == [int(tokens[0]) for tokens in batch.tokens]


def test_the_base_is_asked_about_every_answer_once() -> None:
    rows = judged(pairs(5), "kto", 100)
    sequences = [sequence for row in rows for sequence in row.sequences]
    seen: dict[int, list[int]] = {}
    for process in range(3):
        for places, batch in sequence_batches(rows, 4, 0, process, 3):
            idling = not len(places)
            assert idling == (batch.real_tokens == 0)
            known = zip(places, batch.tokens, batch.lengths, strict=not idling)
            for place, tokens, length in known:
                assert place not in seen
                seen[int(place)] = tokens[:length].tolist()
    assert seen == {place: row.tokens.tolist() for place, row in enumerate(sequences)}


def test_references_are_read_back_exactly_and_only_where_they_belong(tmp_path: Any) -> None:
    path = tmp_path / "reference.safetensors"
    reference = Reference(np.random.default_rng(0).normal(size=(5, 2)), np.zeros((0, 2)))
    shapes = {"train": (5, 2), "evaluation": (0, 2)}
    write_reference(path, "key", reference)
    found = read_reference(path, "key", shapes)
    assert found is not None
    np.testing.assert_array_equal(found.train, reference.train)
    assert read_reference(path, "another key", shapes) is None
    assert read_reference(path, "key", {**shapes, "train": (4, 2)}) is None
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    assert read_reference(path, "key", shapes) is None
    path.write_bytes(b"")
    assert read_reference(path, "key", shapes) is None
    assert read_reference(tmp_path / "none", "key", shapes) is None


def test_other_weights_under_the_same_name_have_another_key(tmp_path: Any) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    first = reference_key({"data": "x"}, tmp_path)
    assert reference_key({"data": "x"}, tmp_path) == first
    assert reference_key({"data": "y"}, tmp_path) != first
    weights.write_bytes(b"12")
    assert reference_key({"data": "x"}, tmp_path) != first


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("task: dpo\ndata: {train: x, packing: true}", "data.packing"),
        ("task: dpo\ndata: {train: x, format: messages}", "data.format"),
        ("task: dpo\ndata: {train: x, format: unpaired-preference}", "data.format"),
        ("task: sft\ndata: {train: x, format: preference}", "data.format"),
        ("data: {train: x}\ntraining: {beta: 0.1}", "training.beta"),
        ("task: ipo\ndata: {train: x}\ntraining: {label_smoothing: 0.1}", "training.label_smoothing"),
        ("task: dpo\ndata: {train: x}\ntraining: {simpo_gamma: 0.1}", "training.simpo_gamma"),
        ("task: dpo\ndata: {train: x}\ntraining: {cpo_alpha: 1}", "training.cpo_alpha"),
        ("task: cpo\ndata: {train: x}\ntraining: {simpo_gamma: 0.1}", "training.simpo_gamma"),
        ("task: bco\ndata: {train: x}\ntraining: {desirable_weight: 2}", "training.desirable_weight"),
    ],
)
def test_what_a_task_does_not_read_is_refused(text: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(f"base: tiny\n{text}\n", "soup.yaml")
    [problem] = caught.value.problems
    assert problem.where.endswith(where)
    assert problem.code == ("contradiction" if where.startswith("data") else "key-without-effect")
