"""Reading another tool's file: whose it is, what YAML is allowed, and that nothing is lost whatever it holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soup_xb.core.config.yaml import write_yaml
from soup_xb.core.errors import ConfigError
from soup_xb.migrate import TOOLS, Migration, migrate
from soup_xb.migrate.account import entries, read_source

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "not-a-mapping"),
        ("- a\n", "not-a-mapping"),
        ("a: 1\na: 2\n", "duplicate-key"),
        ("a: !!python/name:os.system\n", "yaml-tag"),
        ("a: *a\n", "yaml-alias"),
        ("a: &a [*a]\n", "yaml-alias"),
        (BOMB, "config-too-large"),
        ("a: &a {b: 1}\n" + "x: " + "[" * 31 + "*a" + "]" * 31 + "\n", "yaml-too-deep"),
        ("<<: 5\nbase_model: x\n", "yaml-merge"),
        ("base_model: [\n", "yaml-syntax"),
        ("color: blue\nsize: 5\n", "migrate-unknown"),
        ("base_model: x\nstage: sft\n", "migrate-unknown"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(text: str, code: str) -> None:
    start = time.process_time()
    with pytest.raises(ConfigError) as refused:
        migrate(text, "theirs.yaml")
    assert refused.value.problems[0].code == code, refused.value
    assert time.process_time() - start < 5


def test_the_tool_can_be_named_where_the_keys_do_not_tell(accounted: Callable[..., Migration]) -> None:
    assert accounted("base_model: x\nstage: sft\n", "axolotl", ok=False).tool == "axolotl"


def test_what_a_mapping_writes_itself_wins_over_what_it_merges() -> None:
    text = "one: &one {a: 1, b: 1}\ntwo: &two {b: 2, c: 2}\nmerged:\n  <<: [*one, *two]\n  a: 0\n"
    found = {key: entry.value for key, entry in entries(read_source(text, "x")).items() if "merged" in key}
    assert found == {"merged.a": 0, "merged.b": 1, "merged.c": 2}


def test_a_name_with_a_token_or_an_escape_is_shown_harmless(accounted: Callable[..., Migration]) -> None:
    done = accounted(
        'base_model: x\nadapter: lora\n"\\e[31mred": 1\nhub_token: hf_abcdefghijklmnopqrstuvwxyz0123\n',
        ok=False,
    )
    assert "\x1b" not in done.text
    assert "hf_abc" not in done.text


SCALARS = st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats() | st.text(max_size=8)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=6,
)
KNOWN = {
    "axolotl": [
        *(
            "base_model",
            "adapter",
            "load_in_4bit",
            "load_in_8bit",
            "datasets",
            "test_datasets",
            "sequence_len",
        ),
        *("pretraining_dataset", "val_set_size", "lora_r", "lora_target_linear", "lora_target_modules"),
        *("micro_batch_size", "batch_size", "num_epochs", "max_steps", "bf16", "optimizer", "relora"),
        *("relora_steps", "relora_warmup_steps", "jagged_restart_steps", "eval_steps", "chat_template"),
        *("peft_init_lora_weights", "reward_model", "gradient_checkpointing", "warmup_ratio", "save_steps"),
    ],
    "llama-factory": [
        *(
            "model_name_or_path",
            "dataset",
            "eval_dataset",
            "dataset_dir",
            "val_size",
            "lora_rank",
            "lora_target",
        ),
        *("quantization_bit", "quantization_method", "pissa_init", "num_train_epochs", "max_steps", "fp16"),
        *(
            "adapter_name_or_path",
            "finetuning_type",
            "train_on_prompt",
            "template",
            "warmup_steps",
            "packing",
        ),
    ],
    "soup": ["base", "data", "training", "output", "backend", "modality", "lora", "eval"],
}


@settings(max_examples=150, deadline=None)
@given(data=st.data(), tool=st.sampled_from(TOOLS))
def test_whatever_a_file_holds_each_key_is_accounted_for(data: st.DataObject, tool: str) -> None:
    names = st.sampled_from(KNOWN[tool]) | st.text(min_size=1, max_size=6)
    content = data.draw(st.dictionaries(names, VALUES, max_size=8))
    try:
        text = _yaml(content)
        root = read_source(text, "theirs.yaml")
    except (ConfigError, ValueError):
        return
    whole = (
        "training.lora.rank_pattern",
        "training.lora.alpha_pattern",
        "lora.rank_pattern",
        "lora.alpha_pattern",
    )
    keys = sorted(entries(root, whole if tool == "soup" else ()))
    try:
        done = migrate(text, "theirs.yaml", tool)
    except ConfigError as error:
        assert error.problems[0].code in ("migrate-task", "config-too-large", "yaml-merge")
        return
    assert sorted([*(one.key for one in done.carried), *(one.key for one in done.left)]) == keys


def _yaml(content: dict[str, Any]) -> str:
    """Nested lists and mappings in JSON's form, which is YAML."""
    import json

    return json.dumps(content, ensure_ascii=True, allow_nan=False) if content else write_yaml(content)


def test_what_no_engine_offers_today_is_taken_back_and_the_rest_runs(
    accounted: Callable[..., Migration],
) -> None:
    from soup_xb.core.config.support_rows import BACKENDS, ROWS

    packing = next(row for row in ROWS if row.name == "data.packing")
    done = accounted("base_model: x\ndatasets: [{path: a.jsonl}]\nadapter: lora\nsample_packing: true\n")
    assert ("packing: true" in done.text) != all(packing.answer(backend) for backend in BACKENDS)
