"""Rules over several keys of a config: what cannot be combined in `training.lora` and with a sharded base."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attrs import frozen

from soup_xb.core.config.schema import LoadedConfig
from soup_xb.core.errors import Problem
from soup_xb.core.tasks import TASKS


@frozen
class Rule:
    """One check. It is left out where one of the `keys` that it reads was refused already."""

    check: Callable[[LoadedConfig], Iterator[Problem]]
    keys: tuple[str, ...]
    warning: bool = False


def excluded(loaded: LoadedConfig, subject: tuple[str, str], other: str, reason: str) -> Problem:
    """The problem of two keys that do not go together; `subject` is a key and what it stands for."""
    key, what = subject
    return Problem(
        "contradiction",
        f"{what} does not go with `{other}` ({line_words(loaded, other)}): {reason}",
        loaded.where(key),
        "remove one of the two.",
    )


def line_words(loaded: LoadedConfig, key: str) -> str:
    """The line of a key, in words."""
    line = loaded.written.get(key)
    if line is None:
        return "not written"
    return f"line {line}" if line else "command line"


_LORA = "training.lora"
_STRATEGY = f"{_LORA}.init_strategy"


def _strategy(loaded: LoadedConfig) -> tuple[str, str]:
    """The start that is asked for and the key that asks for it."""
    lora = loaded.config.training.lora
    return lora.start, f"{_LORA}.use_olora" if lora.use_olora else _STRATEGY


def _one_strategy(loaded: LoadedConfig) -> Iterator[Problem]:
    lora = loaded.config.training.lora
    if lora.use_olora and _STRATEGY in loaded.written and lora.init_strategy != "olora":
        key = f"{_LORA}.use_olora"
        yield Problem(
            "contradiction",
            f"`use_olora: true` ({line_words(loaded, key)}) means `init_strategy: olora`, "
            f"and `init_strategy` is `{lora.init_strategy}` ({line_words(loaded, _STRATEGY)})",
            loaded.where(key),
            "keep `init_strategy` and remove `use_olora`.",
        )


def _strategy_needs_plain_factors(loaded: LoadedConfig) -> Iterator[Problem]:
    lora = loaded.config.training.lora
    strategy, key = _strategy(loaded)
    if strategy == "random":
        return
    for other, on, reason in (
        ("use_vera", lora.use_vera, "VeRA's factors are shared and cannot hold any weight's directions"),
        ("use_dora", lora.use_dora, "DoRA's start is not exact once the base holds the residual alone"),
    ):
        if on:
            yield excluded(loaded, (key, f"the {strategy} start"), f"{_LORA}.{other}", reason)


def _vera_alone(loaded: LoadedConfig) -> Iterator[Problem]:
    lora = loaded.config.training.lora
    if not lora.use_vera:
        return
    for key, what, on, reason in (
        ("use_dora", "DoRA", lora.use_dora, "they are two kinds of adapter"),
        ("use_rslora", "rsLoRA", lora.use_rslora, "VeRA has no alpha to scale by"),
        (
            "rank_pattern",
            "a pattern",
            bool(lora.rank_pattern),
            "its modules share one pair of factors and its rank",
        ),
        (
            "alpha_pattern",
            "a pattern",
            bool(lora.alpha_pattern),
            "VeRA has no alpha: its trained vectors scale",
        ),
        (
            "target_modules",
            "`auto+experts`",
            lora.target_modules == "auto+experts",
            "its shared factors are matrices, and experts are 3-D",
        ),
    ):
        if on:
            yield excluded(loaded, (f"{_LORA}.{key}", what), f"{_LORA}.use_vera", reason)


def _dora_without_experts(loaded: LoadedConfig) -> Iterator[Problem]:
    lora = loaded.config.training.lora
    if lora.use_dora and lora.target_modules == "auto+experts":
        subject = (f"{_LORA}.target_modules", "`auto+experts`")
        yield excluded(loaded, subject, f"{_LORA}.use_dora", "PEFT has no DoRA for 3-D experts")


def _vera_without_restarts(loaded: LoadedConfig) -> Iterator[Problem]:
    training = loaded.config.training
    if not training.lora.use_vera or training.relora_steps is None:
        return
    reasons = {
        "prune": "a prune zeroes entries of A and B, which VeRA shares between all modules and does not train",
        "merge": "a merge leaves a piece with its own factors behind, and a VeRA adapter has one pair for all",
    }
    keys = ("training.relora_steps", f"ReLoRA's {training.relora_mode}")
    yield excluded(loaded, keys, f"{_LORA}.use_vera", reasons[training.relora_mode])


def _warm_start_has_factors(loaded: LoadedConfig) -> Iterator[Problem]:
    strategy, key = _strategy(loaded)
    if loaded.config.adapter is not None and strategy != "random":
        yield excluded(
            loaded, (key, f"the {strategy} start"), "adapter", "a saved adapter brings its own factors"
        )


def _start_with_dropout(loaded: LoadedConfig) -> Iterator[Problem]:
    strategy, _ = _strategy(loaded)
    if strategy != "random" and loaded.config.training.lora.dropout > 0:
        yield Problem(
            "start-not-exact",
            f"the {strategy} start with dropout is not exact in training: dropout also drops base weight",
            loaded.where(f"{_LORA}.dropout"),
            "use `dropout: 0` for a start that equals the base.",
        )


LORA_RULES = (
    Rule(_one_strategy, (f"{_LORA}.use_olora", _STRATEGY)),
    Rule(
        _strategy_needs_plain_factors,
        (f"{_LORA}.use_olora", _STRATEGY, f"{_LORA}.use_vera", f"{_LORA}.use_dora"),
    ),
    Rule(
        _vera_alone,
        tuple(
            f"{_LORA}.{name}"
            for name in (
                "use_vera",
                "use_dora",
                "use_rslora",
                "rank_pattern",
                "alpha_pattern",
                "target_modules",
            )
        ),
    ),
    Rule(_dora_without_experts, (f"{_LORA}.use_dora", f"{_LORA}.target_modules")),
    Rule(_vera_without_restarts, (f"{_LORA}.use_vera", "training.relora_steps", "training.relora_mode")),
    Rule(_warm_start_has_factors, (_STRATEGY, f"{_LORA}.use_olora", "adapter")),
    Rule(_start_with_dropout, (_STRATEGY, f"{_LORA}.use_olora", f"{_LORA}.dropout"), warning=True),
)


_SHARDING = "training.sharding"

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
        yield excluded(loaded, (_SHARDING, "`fsdp`"), "training.quantization", reason)


def _no_dora(loaded: LoadedConfig) -> Iterator[Problem]:
    if _sharded(loaded) and loaded.config.training.lora.use_dora:
        reason = "DoRA's start and the proof of its adapter take norms of whole weights, of which a process has rows"
        yield excluded(loaded, (_SHARDING, "`fsdp`"), "training.lora.use_dora", reason)


def _known_tasks(loaded: LoadedConfig) -> Iterator[Problem]:
    reason = TASKS[loaded.config.task].no_sharding
    if _sharded(loaded) and reason:
        yield excluded(loaded, (_SHARDING, "`fsdp`"), "task", reason)


SHARDING_RULES = (
    Rule(_no_quantized_base, (_SHARDING, "training.quantization")),
    Rule(_no_dora, (_SHARDING, "training.lora.use_dora")),
    Rule(_known_tasks, (_SHARDING, "task")),
)
