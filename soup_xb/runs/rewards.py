"""Rewards out of a config, opened before the base is, and the session that earns them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from soup_xb.core.config.load import LoadedConfig
from soup_xb.core.config.schema import SAMPLED
from soup_xb.core.objectives.answer_pattern import BUILT_IN, compiled_pattern
from soup_xb.core.objectives.rewards import PatternReward, Reward
from soup_xb.core.objectives.rollouts import RolloutSession, Rules
from soup_xb.core.rows.prompts import PromptRow
from soup_xb.core.run.session import GenerationSettings, SamplingSession, TrainingSession
from soup_xb.runs.open import OpenRun
from soup_xb.runs.reward_file import load_reward
from soup_xb.runs.reward_model import open_reward_model


@contextmanager
def open_rewards(loaded: LoadedConfig) -> Iterator[tuple[Reward, ...]]:
    """What the config's answers earn.

    Raises ConfigError for a file of rewards that does not run, ModelError for a folder without a reward model.
    """
    training = loaded.config.training
    where = loaded.where("training.answer_pattern")
    rewards = tuple(
        PatternReward(reward, compiled_pattern(training.answer_pattern, where), where)
        if reward in BUILT_IN
        else load_reward(reward)
        for reward in training.rewards
    )
    if training.reward_model is None:
        yield rewards
        return
    with open_reward_model(loaded.config) as judge:
        yield (judge, *rewards)


def session_for(run: OpenRun, rewards: Sequence[Reward]) -> TrainingSession:
    """What the loop trains through: for tasks that sample, the session with rollouts before it.

    Raises DataError for a row that a reward cannot judge.
    """
    config = run.loaded.config
    if config.task not in SAMPLED:
        return run.session
    rows = [row for row in (*run.plan.rows, *run.plan.evaluation) if isinstance(row, PromptRow)]
    for reward in rewards:
        reward.check(rows)
    training = config.training
    rules = Rules(
        rewards=rewards,
        decode=run.tokenizer.decode,
        group_size=training.group_size,
        generation=GenerationSettings(
            training.max_new_tokens, training.temperature, run.tokenizer.end_ids, training.seed
        ),
        pad_id=run.plan.pad_id,
    )
    return RolloutSession(cast("SamplingSession", run.session), rules)
