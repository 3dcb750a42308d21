"""What `training.sharding: fsdp` goes with, judged from the file alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from soup_xb.core.config.checks import contradictions
from soup_xb.core.config.load import parse_config
from soup_xb.core.errors import ConfigError

BASE = {"base": "tiny", "data": {"train": "rows.jsonl"}}


def load(task: str = "sft", lora: dict[str, Any] | None = None, **training: Any) -> Any:
    content = {**BASE, "task": task, "training": {**training, "lora": lora or {}}}
    return parse_config(json.dumps(content), "soup.yaml")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantization": "4bit"}, "out of whole matrices"),
        ({"quantization": "8bit"}, "hangs the scales of its rows on the parameter"),
        ({"lora": {"use_dora": True}}, "norms of whole weights"),
        ({"task": "grpo", "rewards": ("format",)}, "equally often"),
    ],
)
def test_what_does_not_go_with_a_sharded_base_is_refused_with_its_own_reason(
    settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        loaded = load(sharding="fsdp", **settings)
        raise ConfigError.of(contradictions(loaded))
    assert not contradictions(load(sharding="none", **settings))


@pytest.mark.parametrize("task", ["sft", "pretrain", "dpo", "kto"])
def test_tasks_that_run_the_base_equally_often_go_with_it(task: str) -> None:
    assert not contradictions(load(task, sharding="fsdp"))


def test_an_offload_without_sharding_has_no_effect_and_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sharding. is .fsdp"):
        load(cpu_offload=True)
