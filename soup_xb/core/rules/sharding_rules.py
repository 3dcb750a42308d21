"""What cannot be combined with a base that is cut over the processes."""

from __future__ import annotations

from collections.abc import Iterator

from soup_xb.core.config.loaded import LoadedConfig
from soup_xb.core.config.rules import Rule, excluded
from soup_xb.core.config.schema import PREFERENCE_TASKS
from soup_xb.core.errors import Problem

_KEY = "training.sharding"
# Each runs the model as often on every process, which a model that is gathered block by block needs.
TASKS = ("sft", "pretrain", *(task for task in PREFERENCE_TASKS if task != "reward"))

_QUANTIZED = {
    "4bit": "bitsandbytes makes 4-bit weights out of whole matrices, so that every process would have to read all of "
    "the base, of which 4 bits are an eighth",
    "8bit": "bitsandbytes hangs the scales of its rows on the parameter, and fully_shard puts another in its place",
}


def _sharded(loaded: LoadedConfig) -> bool:
    return loaded.config.training.sharding == "fsdp"


def _no_quantized_base(loaded: LoadedConfig) -> Iterator[Problem]:
    reason = _QUANTIZED.get(loaded.config.training.quantization)
    if _sharded(loaded) and reason is not None:
        yield excluded(loaded, (_KEY, "`fsdp`"), "training.quantization", reason)


def _no_dora(loaded: LoadedConfig) -> Iterator[Problem]:
    if _sharded(loaded) and loaded.config.training.lora.use_dora:
        reason = "DoRA's start and the proof of its adapter take norms of whole weights, of which a process has rows"
        yield excluded(loaded, (_KEY, "`fsdp`"), "training.lora.use_dora", reason)


def _known_tasks(loaded: LoadedConfig) -> Iterator[Problem]:
    if _sharded(loaded) and loaded.config.task not in TASKS:
        reason = "the processes of a sharded base must run it equally often, which this task does not keep"
        if loaded.config.task == "embedding":
            reason = "encoders, and bases without their head, are not cut over processes here; most of them are small"
        yield excluded(loaded, (_KEY, "`fsdp`"), "task", reason)


RULES = (
    Rule(_no_quantized_base, (_KEY, "training.quantization")),
    Rule(_no_dora, (_KEY, "training.lora.use_dora")),
    Rule(_known_tasks, (_KEY, "task")),
)
