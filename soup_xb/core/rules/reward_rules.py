"""What the keys of rewards must say together."""

from __future__ import annotations

import re
from collections.abc import Iterator

from soup_xb.core.config.loaded import LoadedConfig
from soup_xb.core.config.rules import Rule
from soup_xb.core.config.schema import JUDGED, PAIRED, SAMPLED
from soup_xb.core.errors import ConfigError, Problem
from soup_xb.core.objectives.answer_pattern import BUILT_IN, compiled_pattern
from soup_xb.core.text import did_you_mean

_FILE = re.compile(r"(?P<path>.+\.py):(?P<function>[^\W\d]\w*)", re.DOTALL)
_FORM = "write `exact-match`, `format`, or a function of yours as `./rewards.py:function`."


def file_function(reward: str) -> tuple[str, str] | None:
    """Path and function of a reward that is a person's own, None for any other text.

    >>> file_function("./rewards.py:short"), file_function("format")
    (('./rewards.py', 'short'), None)
    """
    match = _FILE.fullmatch(reward)
    return (match["path"], match["function"]) if match else None


def _something_is_earned(loaded: LoadedConfig) -> Iterator[Problem]:
    config = loaded.config
    if config.task == "grpo" and not config.training.rewards:
        yield Problem(
            "missing-key",
            "`task: grpo` learns from what answers earn, and no reward is named",
            loaded.where("training.rewards"),
            _FORM,
        )
    if config.task == "rlhf" and config.training.reward_model is None:
        yield Problem(
            "missing-key",
            "`task: rlhf` learns from what a reward model thinks, and none is named",
            loaded.where("training.reward_model"),
            "train one with `task: reward`, and write its output folder here.",
        )


def _rewards_are_known(loaded: LoadedConfig) -> Iterator[Problem]:
    rewards = loaded.config.training.rewards
    for reward in rewards:
        if reward not in BUILT_IN and file_function(reward) is None:
            yield Problem(
                "unknown-reward",
                f"`{reward}` is no reward",
                loaded.where("training.rewards"),
                did_you_mean(reward[:60], BUILT_IN) or _FORM,
            )
    if len(set(rewards)) < len(rewards):
        yield Problem(
            "contradiction",
            "names a reward twice",
            loaded.where("training.rewards"),
            "remove one of the two.",
        )


def _pattern_is_one(loaded: LoadedConfig) -> Iterator[Problem]:
    where = loaded.where("training.answer_pattern")
    if "training.answer_pattern" not in loaded.written:
        return
    try:
        compiled_pattern(loaded.config.training.answer_pattern, where)
    except ConfigError as error:
        yield from error.problems


def _pattern_is_read(loaded: LoadedConfig) -> Iterator[Problem]:
    training = loaded.config.training
    if "training.answer_pattern" not in loaded.written or loaded.config.task not in SAMPLED:
        return
    if not set(training.rewards) & set(BUILT_IN):
        yield Problem(
            "key-without-effect",
            "has no effect without the reward `exact-match` or `format`",
            loaded.where("training.answer_pattern"),
            "remove it, or name one of the two in `training.rewards`.",
        )


def _only_rollouts_go_without_a_base(loaded: LoadedConfig) -> Iterator[Problem]:
    if loaded.config.training.beta == 0 and loaded.config.task in (*PAIRED, *JUDGED):
        yield Problem(
            "contradiction",
            f"must be above 0 for `task: {loaded.config.task}`, got 0",
            loaded.where("training.beta"),
        )


RULES = (
    Rule(_something_is_earned, ("task", "training.rewards", "training.reward_model")),
    Rule(_rewards_are_known, ("training.rewards",)),
    Rule(_pattern_is_one, ("training.answer_pattern",)),
    Rule(_pattern_is_read, ("task", "training.rewards", "training.answer_pattern")),
    Rule(_only_rollouts_go_without_a_base, ("task", "training.beta")),
)
