"""Rows of pairs, their micro-batches over several processes, and what is refused before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soup_xb.core.adapter.extras import (
    EmbeddingFacts,
    base_pooling,
    read_embedding_facts,
    write_embedding_files,
)
from soup_xb.core.base.modules import Module, resolve_adapters
from soup_xb.core.config.load import parse_config
from soup_xb.core.config.schema import Config, DataConfig, TrainingConfig
from soup_xb.core.errors import ConfigError, DataError, ModelError
from soup_xb.core.rows.batches import MicroBatch, contrast_batch
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.formats.detect import detect_format, extra_columns, to_example
from soup_xb.core.rows.formats.every import embedding_formats
from soup_xb.core.rows.row import Row, TokenSequence, repeated_positives
from soup_xb.core.run.plan import make_plan

SOURCE = Source("rows.jsonl", 3)
FACTS = EmbeddingFacts(pooling="last", scale=30.0, max_length=64, query_prompt="query: ")


def text(*tokens: int) -> TokenSequence:
    return TokenSequence(tokens, np.zeros(len(tokens), np.bool_), SOURCE)


def rows(count: int) -> list[Row]:
    """Every second one has a negative; each text begins with its own token."""
    texts = [(text(10 + i), text(30 + i, *range(i)), text(50 + i, 1, 2)) for i in range(count)]
    return [Row("embedding", sides if i % 2 else sides[:2]) for i, sides in enumerate(texts)]


def candidates(batch: MicroBatch) -> MicroBatch:
    assert batch.beside is not None
    return batch.beside


@pytest.mark.parametrize(
    "columns",
    [
        ("anchor", "positive", "negative"),
        ("query", "positive", "negative"),
        ("question", "answer", "hard_negative"),
        ("query", "passage", "neg"),
        ("sentence1", "sentence2", "negative"),
    ],
)
def test_rows_are_read_under_the_names_that_users_know(columns: tuple[str, str, str]) -> None:
    formats = embedding_formats("query: ", "passage: ")
    row: dict[str, Any] = dict(zip(columns, ("a", "b", "c"), strict=True))
    found = detect_format([(SOURCE, row)], formats)
    assert found.name == "anchor-positive"
    assert f"`{columns[0]}` and `{columns[1]}`" in found.reason
    example = to_example(row, SOURCE, found.name, formats)
    assert (example.anchor, example.positive, example.negative) == ("query: a", "passage: b", "passage: c")
    assert extra_columns(row | {"score": 0.3}, found.name, formats) == ["score"]


def test_an_alias_beside_the_own_name_is_a_column_of_no_use() -> None:
    formats = embedding_formats()
    row = {"anchor": "a", "query": "q", "positive": "p", "negative": None}
    example = to_example(row, SOURCE, "anchor-positive", formats)
    assert (example.anchor, example.negative) == ("a", None)
    assert extra_columns(row, "anchor-positive", formats) == ["query"]


@pytest.mark.parametrize(
    ("row", "code", "place"),
    [
        ({"anchor": "a"}, "missing-field", "positive"),
        ({"anchor": "a", "positive": ["p"]}, "mistyped-field", "positive"),
        ({"anchor": "a", "positive": "p", "negative": 3}, "mistyped-field", "negative"),
    ],
)
def test_a_wrong_row_is_named(row: dict[str, Any], code: str, place: str) -> None:
    with pytest.raises(DataError) as refused:
        to_example(row, SOURCE, "anchor-positive", embedding_formats())
    (problem,) = refused.value.problems
    assert (problem.code, problem.where) == (code, f"rows.jsonl:3: {place}")


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_shares_of_all_processes_are_the_candidates_in_one_order(count: int, processes: int) -> None:
    whole = contrast_batch(rows(count), (0, 1), 0)
    order: dict[int, int] = {}
    for process in range(processes):
        share = contrast_batch(rows(count), (process, processes), 0)
        own, places = int(share.counted.sum()), share.constants["places"].tolist()
        assert share.constants["count"] == whole.constants["count"] == count + count // 2
        assert own == len(range(process, count, processes))
        assert np.count_nonzero(candidates(share).lengths) == len(places)
        first = candidates(share).tokens[: len(places), 0]
        assert not order.keys() & set(places)
        order |= dict(zip(places, first.tolist(), strict=True))
        right, anchors = share.constants["right"][:own], share.tokens[:own, 0]
        assert [order[place] for place in right.tolist()] == (anchors + 20).tolist()
        # An idle process embeds an anchor and a positive all the same, for which its arrays have an entry each.
        assert len(share.counted) == len(share.constants["right"]) == len(share.tokens) == max(1, own)
    assert [order[place] for place in range(len(order))] == candidates(whole).tokens[:, 0].tolist()


def test_nothing_is_padded_to_another_sides_length() -> None:
    batch = contrast_batch(rows(6), (0, 1), 0)
    assert batch.tokens.shape == (6, 1)
    assert candidates(batch).tokens.shape == (9, 6)
    assert batch.target_tokens == 0


def plan_of(batch_size: int, learned: list[Row]) -> Any:
    training = TrainingConfig(batch_size=batch_size)
    config = Config(base="tiny", task="embedding", data=DataConfig(train="rows.jsonl"), training=training)
    resolution = resolve_adapters([Module("layers.0.q_proj", 4, 4)], training.lora, {})
    return make_plan(config, resolution, tuple(learned), (), 0)


def test_a_plan_counts_rows_and_their_tokens() -> None:
    plan = plan_of(4, rows(8))
    assert plan.adapters.task_type == "FEATURE_EXTRACTION"
    assert (plan.examples(1), plan.target_tokens(1)) == (4, 0)
    assert sum(plan.real_tokens(step) for step in (1, 2)) == sum(row.real_tokens for row in rows(8))
    (batch,) = plan.micro_batches(1, 1, 2)
    assert len(candidates(batch).lengths) == 4
    assert len(batch.lengths) == 2


def test_anchors_that_have_nothing_to_be_told_from_are_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        plan_of(1, rows(1) * 3)
    assert refused.value.problems[0].code == "no-negatives"
    assert plan_of(1, rows(2)).total_steps == 6


def test_texts_that_are_right_for_several_rows_are_counted() -> None:
    assert repeated_positives(rows(4)) == []
    (problem,) = repeated_positives([*rows(4), rows(4)[2]])
    assert problem.code == "repeated-positives"
    assert problem.message.startswith("2 of 5 rows")


@pytest.mark.parametrize(
    ("lines", "where"),
    [
        ("training: {pooling: mean}", "training.pooling"),
        ("training: {embedding_scale: 5}", "training.embedding_scale"),
        ("task: embedding\ntraining: {router_aux_loss_coef: 0.1}", "training.router_aux_loss_coef"),
        ("task: embedding\ntraining: {beta: 0.1}", "training.beta"),
        ("task: embedding\ndata: {train: rows.jsonl, packing: true}", "data.packing"),
        ("task: embedding\ndata: {train: rows.jsonl, format: messages}", "data.format"),
        ("data: {train: rows.jsonl, query_prompt: 'query: '}", "data.query_prompt"),
        ("data: {train: rows.jsonl, format: anchor-positive}", "data.format"),
    ],
)
def test_keys_that_mean_nothing_here_are_refused(lines: str, where: str) -> None:
    data = "" if "data:" in lines else "data: {train: rows.jsonl}\n"
    with pytest.raises(ConfigError) as refused:
        parse_config(f"base: tiny\n{data}{lines}\n", "soup.yaml")
    assert any(problem.where.endswith(where) for problem in refused.value.problems)


def test_what_is_written_for_sentence_transformers_is_read_back(tmp_path: Path) -> None:
    assert read_embedding_facts(tmp_path) is None
    write_embedding_files(tmp_path, FACTS, 32)
    assert read_embedding_facts(tmp_path) == FACTS
    assert base_pooling(tmp_path) == "last"
    settings = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == {"query": "query: ", "document": ""}


@pytest.mark.parametrize(
    "content",
    ["[]", "{", "{}", '{"pooling": "max", "scale": 20, "max_length": 5}',
     '{"pooling": "mean", "scale": -1, "max_length": 5}', '{"pooling": "mean", "scale": true, "max_length": 5}',
     '{"pooling": "mean", "scale": 20, "max_length": 0.5}', '{"pooling": 3, "scale": 20, "max_length": 5}'],
)  # fmt: skip
def test_a_file_that_was_never_written_so_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "embedding.json").write_text(content)
    with pytest.raises(ModelError) as refused:
        read_embedding_facts(tmp_path)
    assert refused.value.problems[0].code == "damaged-adapter"


@pytest.mark.parametrize(
    ("pooling", "code"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode": ["cls", "mean"]}, "unknown-pooling"),
        ({"pooling_mode_max_tokens": True}, "unknown-pooling"),
        ({}, "unknown-pooling"),
    ],
)
def test_the_bases_own_pooling_is_read_in_both_spellings(
    tmp_path: Path, pooling: dict[str, Any], code: str
) -> None:
    write_embedding_files(tmp_path, FACTS, 32)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if code != "unknown-pooling":
        assert base_pooling(tmp_path) == code
        return
    with pytest.raises(ModelError) as refused:
        base_pooling(tmp_path)
    assert refused.value.problems[0].code == code


@pytest.mark.parametrize("content", ['[{"type": "a.Transformer"}, {"type": "a.Dense"}]', "[3]", "{}", "["])
def test_a_base_with_further_layers_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ModelError) as refused:
        base_pooling(tmp_path)
    assert refused.value.problems[0].code in ("further-layers", "base-config")
