"""A reward model that an earlier run left, asked what it thinks of sampled answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from attrs import evolve, frozen

from soup_xb.backends import open_session
from soup_xb.core.adapter.peft_file import SavedAdapter, adapter_folder, read_adapter
from soup_xb.core.base.rope import noted_scaling
from soup_xb.core.disk import local_path
from soup_xb.core.errors import DataError, ModelError
from soup_xb.core.objectives.rewards import Answer
from soup_xb.core.objectives.settings import Reward
from soup_xb.core.rows.batches import collate
from soup_xb.core.rows.examples import ChatExample, CompletionExample, Example, Message, TokenRow
from soup_xb.core.rows.prompts import PromptRow
from soup_xb.core.rows.turns import read_turns
from soup_xb.core.run.session import JudgingSession
from soup_xb.data.hub import resolve_base
from soup_xb.data.tokenizer import ChatTokenizer, open_tokenizer
from soup_xb.runs.adapters import attach_saved, base_of, session_on

if TYPE_CHECKING:
    from soup_xb.core.config.schema import Config

# Answers that are scored together.
_BATCH = 16


@frozen(eq=False)
class ModelReward:
    """The score of an answer with its prompt, as the reward model's own tokenizer and chat template write them."""

    session: JudgingSession
    tokenizer: ChatTokenizer
    name: str = "reward_model"

    def check(self, rows: Sequence[PromptRow]) -> None:
        """Raise ModelError for conversations that the reward model cannot write."""
        chat = next((row for row in rows if isinstance(row.columns["prompt"], list)), None)
        if chat is not None and not self.tokenizer.has_chat_template:
            raise ModelError(
                "no-chat-template",
                "the reward model has no chat template, and the prompts are conversations",
                where="training.reward_model",
                help="train it on a base with one.",
            )

    def earned(self, answers: Sequence[Answer]) -> list[float]:
        """One score an answer, longest rows together."""
        rows = [self._row(answer) for answer in answers]
        order = sorted(range(len(rows)), key=lambda place: -rows[place].length)
        scores = [0.0] * len(rows)
        for start in range(0, len(order), _BATCH):
            places = order[start : start + _BATCH]
            batch = collate([rows[place] for place in places], self.tokenizer.pad_id)
            for place, score in zip(places, self.session.scores(batch).tolist(), strict=True):
                scores[place] = score
        return scores

    def _row(self, answer: Answer) -> TokenRow:
        prompt, source = answer.row.columns["prompt"], answer.row.source
        example: Example
        if isinstance(prompt, list):
            turns = (*read_turns(answer.row.columns, "prompt", source), Message("assistant", answer.text))
            example = ChatExample(turns, source, len(turns) - 1)
        else:
            example = CompletionExample(prompt, answer.text, source)
        row = self.tokenizer.tokenize(example, sys.maxsize).row
        if isinstance(row, TokenRow):
            return row
        # An answer without words has nothing to learn, and a score all the same.
        return self._bare(example)

    def _bare(self, example: Example) -> TokenRow:
        if isinstance(example, ChatExample):
            tokens = self.tokenizer.prompt_ids(example.messages[:-1], str(example.source))
        else:
            tokens = self.tokenizer.text_ids(example.prompt)
        if not tokens.size:
            raise DataError("nothing-to-score", "prompt and answer are empty", where=str(example.source))
        return TokenRow(tokens, [False] * tokens.size, example.source)


@contextmanager
def open_reward_model(config: Config) -> Iterator[ModelReward]:
    """The reward model that the config names, on its own base; closed on every exit.

    Raises ModelError for a folder without one.
    """
    folder = adapter_folder(local_path(config.training.reward_model or ""))
    saved = read_adapter(folder)
    if saved.head is None:
        raise ModelError(
            "no-reward-model",
            "is an adapter without a head: it writes, and scores nothing",
            where=str(folder),
            help="name the output folder of a `task: reward` run.",
        )
    base = resolve_base(base_of(saved, folder))
    settings = evolve(
        session_on(base, config.training.precision),
        quantization=config.training.quantization,
        objective=Reward(),
        rope_scaling=noted_scaling(saved.settings, folder),
    )
    session = cast("JudgingSession", open_session("torch", settings))
    try:
        _attach(session, saved, folder)
        yield ModelReward(session, open_tokenizer(_tokenizer_folder(folder, base)))
    finally:
        session.close()


def _attach(session: JudgingSession, saved: SavedAdapter, folder: Path) -> None:
    attach_saved(session, saved, folder)
    if saved.head is not None:
        session.load_head(saved.head)


def _tokenizer_folder(folder: Path, base: Path) -> Path:
    return folder if (folder / "tokenizer_config.json").is_file() else base
