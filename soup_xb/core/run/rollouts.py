"""The session of a task that samples: every batch of prompts is answered and judged before it is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from attrs import evolve, frozen

from soup_xb.core.objectives.rewards import Answer, Reward
from soup_xb.core.random_numbers import uniform
from soup_xb.core.rows.batches import MicroBatch, collate
from soup_xb.core.rows.row import Row, TokenSequence
from soup_xb.core.run.session import (
    GenerationSettings,
    LossSum,
    RestartResult,
    RestartSettings,
    Session,
    StepResult,
    StepSettings,
)

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class Rules:
    """How answers are sampled and what they earn: the sum of the `rewards`.

    `decode` turns token ids into text without special tokens; `pad_id` fills short rows.
    """

    rewards: Sequence[Reward]
    decode: Callable[[Array], str]
    group_size: int
    generation: GenerationSettings
    pad_id: int


class RolloutSession:
    """What the training loop talks to, over a session that can sample.

    The answers of a step are a function of the model, the seed, the step and the row: neither of the other rows
    of a batch, nor of the number of processes, nor of what was sampled before. Each process answers its own rows.
    An evaluation samples with the same numbers each time.
    """

    def __init__(self, session: Session, rules: Rules) -> None:
        """Sample with `session` by `rules`."""
        if session.sampler is None or session.scorer is None:
            raise RuntimeError(f"the {session.backend} session samples no answers")
        self.process, self.processes = session.process, session.processes
        self._session, self._rules = session, rules
        self._sampler, self._scorer = session.sampler, session.scorer

    def train_step(self, micro_batches: Sequence[MicroBatch], step: StepSettings) -> StepResult:
        """Answer the step's prompts with the model as it is, and do one update on the answers."""
        answered = [self._answered(batch, f"step {step.step}") for batch in micro_batches]
        result = self._session.train_step(answered, step)
        own = sum(float((batch.observed["completion_tokens"] * batch.counted).sum()) for batch in answered)
        return evolve(result, sampled_tokens=round(float(self._scorer.sum(np.array([own]))[0])))

    def evaluate(self, micro_batches: Sequence[MicroBatch], adapter: bool = True) -> LossSum:
        """Answer the prompts, and tell how the answers fare; `adapter=False` asks the true base."""
        answered = [self._answered(batch, "evaluation", adapter) for batch in micro_batches]
        return self._session.evaluate(answered, adapter)

    def restart(self, settings: RestartSettings) -> RestartResult:
        """Restart the adapters."""
        return self._session.restart(settings)

    def agree(self, value: int) -> int:
        """The largest value over all processes."""
        return self._session.agree(value)

    def _answered(self, batch: MicroBatch, occasion: str, adapter: bool = True) -> MicroBatch:
        """The batch with every prompt `group_size` times, each with an answer, and what the answers earned."""
        rules = self._rules
        if not batch.counted.any():
            # A process without a row of this micro-batch: what stands in for one earns nothing.
            nothing = {name: np.zeros(len(batch.counted)) for name in self._judged([], [])}
            return evolve(batch, constants={"rewards": nothing["reward"]}, observed=nothing)
        rows = [row for row in batch.prompts for _ in range(rules.group_size)]
        answers = self._sampler.sample(
            [row.sequences[0].tokens for row in rows],
            self._chances(rows, occasion),
            rules.generation,
            adapter,
        )
        judged = self._judged(rows, answers)
        sequences = [_joined(row.sequences[0], answer) for row, answer in zip(rows, answers, strict=True)]
        batch = collate(sequences, rules.pad_id)
        return evolve(batch, constants={"rewards": judged["reward"]}, observed=judged)

    def _chances(self, rows: Sequence[Row], occasion: str) -> Array:
        """Numbers in [0, 1) that choose the tokens, float64 (answers, max_new_tokens)."""
        size, generation = self._rules.group_size, self._rules.generation
        return np.stack(
            [
                uniform(
                    generation.max_new_tokens,
                    "rollout",
                    generation.seed,
                    occasion,
                    row.extra.number,
                    index % size,
                )
                for index, row in enumerate(rows)
            ]
        )

    def _judged(self, rows: Sequence[Row], answers: Sequence[Array]) -> dict[str, Array]:
        """Metrics of each answer, float64 (answers,); the first is the whole reward."""
        rules = self._rules
        ends = rules.generation.end_ids
        texts = [
            Answer(row, rules.decode(answer[:-1] if answer[-1] in ends else answer))
            for row, answer in zip(rows, answers, strict=True)
        ]
        earned = {reward.name: _numbers(reward.earned(texts)) for reward in rules.rewards}
        total = np.sum([np.zeros(len(rows)), *earned.values()], axis=0)
        groups = total.reshape(-1, rules.group_size)
        alike = np.repeat(np.ptp(groups, axis=1) == 0 if len(rows) else _numbers([]), rules.group_size)
        return {
            "reward": total,
            # The one reward of a run is the sum.
            **({f"reward/{name}": values for name, values in earned.items()} if len(earned) > 1 else {}),
            "completion_tokens": _numbers([len(answer) for answer in answers]),
            "cut_off": _numbers([answer[-1] not in ends for answer in answers]),
            "equal_groups": _numbers(alike),
        }


def _joined(prompt: TokenSequence, answer: Array) -> TokenSequence:
    tokens = np.concatenate([prompt.tokens, answer])
    return TokenSequence(tokens, np.arange(tokens.size) >= prompt.length, prompt.source)


def _numbers(values: Any) -> Array:
    return np.asarray(values, dtype=np.float64)
