"""PPO of other tools: the task that does its work here, and the keys that come with it."""

from __future__ import annotations

from soup_xb.migrate.account import Account

_NO_CRITIC = (
    "no critic is trained here; `task: rlhf` optimises against a reward model too, by groups of answers: name the "
    "output of a `task: reward` run as `training.reward_model`"
)


def without_critic(account: Account, key: str) -> None:
    """Leave a task of PPO with the reason, and take the one that comes next to it."""
    if str(account.peek(key)).lower() == "ppo":
        account.leave(key, _NO_CRITIC)
        account.add("task", "rlhf", "the nearest to ppo")
