"""The rewards of a config, opened before the base is: built-in, from a Python file, or an earlier run's reward model.

A person's file is the one place where code that a config names is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from attrs import evolve, frozen

from soup_xb.backends import open_session
from soup_xb.core.adapter.peft_file import WEIGHTS, adapter_folder, read_adapter
from soup_xb.core.base.rope import noted_scaling
from soup_xb.core.config.load import LoadedConfig
from soup_xb.core.config.run_rules import file_function
from soup_xb.core.config.schema import Config, TrainingConfig
from soup_xb.core.disk import local_path
from soup_xb.core.errors import ConfigError, DataError, ModelError
from soup_xb.core.objectives import losses
from soup_xb.core.objectives.answer_pattern import BUILT_IN, compiled_pattern
from soup_xb.core.objectives.objective import ScoreObjective
from soup_xb.core.objectives.rewards import Answer, PatternReward, Reward
from soup_xb.core.rows.batches import collate
from soup_xb.core.rows.examples import ChatExample, CompletionExample, Example, Message
from soup_xb.core.rows.row import Row, TokenSequence
from soup_xb.core.rows.turns import read_turns
from soup_xb.core.run.rollouts import RolloutSession, Rules
from soup_xb.core.run.session import GenerationSettings, Judge, TrainingSession
from soup_xb.core.tasks import TASKS
from soup_xb.core.text import did_you_mean
from soup_xb.data.hub import resolve_base
from soup_xb.data.tokenize import with_call_ids
from soup_xb.data.tokenizer import ChatTokenizer, open_tokenizer
from soup_xb.runs.adapters import attach_saved, base_of, session_on
from soup_xb.runs.open import OpenRun


@contextmanager
def open_rewards(loaded: LoadedConfig, backend: str, day: str = "") -> Iterator[tuple[Reward, ...]]:
    """What the config's answers earn; a reward model is opened on the backend of the run.

    `day` is what a clock in a judge's chat template tells, empty for today.

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
    with open_reward_model(loaded.config, backend) as judge:
        yield (evolve(judge, tokenizer=judge.tokenizer.on_day(day)), *rewards)


def session_for(run: OpenRun, rewards: Sequence[Reward]) -> TrainingSession:
    """What the loop trains through: for tasks that sample, the session with rollouts before it.

    Raises DataError for a row that a reward cannot judge.
    """
    config = run.loaded.config
    if not TASKS[config.task].samples:
        return run.session
    rows = (*run.plan.rows, *run.plan.evaluation)
    return RolloutSession(run.session, rollout_rules(config.training, run.tokenizer, rewards, rows))


def rollout_rules(
    training: TrainingConfig, tokenizer: ChatTokenizer, rewards: Sequence[Reward], rows: Sequence[Row]
) -> Rules:
    """How the answers to `rows` are sampled and judged. Raises DataError for a row that a reward cannot judge."""
    for reward in rewards:
        reward.check(rows)
    return Rules(
        rewards=rewards,
        decode=tokenizer.decode,
        group_size=training.group_size,
        generation=GenerationSettings(
            training.max_new_tokens, training.temperature, tokenizer.end_ids, training.seed
        ),
        pad_id=tokenizer.pad_id,
    )


# Answers that are scored together.
_BATCH = 16


@frozen(eq=False)
class ModelReward:
    """The score of an answer with its prompt, as the reward model's own tokenizer and chat template write them."""

    judge: Judge
    tokenizer: ChatTokenizer
    name: str = "reward_model"

    def check(self, rows: Sequence[Row]) -> None:
        """Raise ModelError for conversations that the reward model cannot write."""
        chat = next((row for row in rows if isinstance(row.extra.columns["prompt"], list)), None)
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
            for place, score in zip(places, self.judge.scores(batch).tolist(), strict=True):
                scores[place] = score
        return scores

    def _row(self, answer: Answer) -> TokenSequence:
        prompt, source = answer.row.extra.columns["prompt"], answer.row.source
        example: Example
        if isinstance(prompt, list):
            asked = with_call_ids(read_turns(answer.row.extra.columns, "prompt", source), self.tokenizer)
            turns = (*asked, Message("assistant", answer.text))
            example = ChatExample(turns, source, len(turns) - 1)
        else:
            example = CompletionExample(prompt, answer.text, source)
        row = self.tokenizer.tokenize(example, sys.maxsize).row
        if row is not None:
            return row.sequences[0]
        # An answer without words has nothing to learn, and a score all the same.
        return self._bare(example)

    def _bare(self, example: Example) -> TokenSequence:
        if isinstance(example, ChatExample):
            tokens = self.tokenizer.prompt_ids(example.messages[:-1], str(example.source))
        else:
            tokens = self.tokenizer.text_ids(example.prompt, str(example.source))
        if not tokens.size:
            raise DataError("nothing-to-score", "prompt and answer are empty", where=str(example.source))
        return TokenSequence(tokens, [False] * tokens.size, example.source)


@contextmanager
def open_reward_model(config: Config, backend: str) -> Iterator[ModelReward]:
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
    opening = evolve(
        session_on(base, config.training.precision),
        quantization=config.training.quantization,
        objective=ScoreObjective(losses.reward, {}, {}),
        rope_scaling=noted_scaling(saved.settings, folder),
    )
    session = open_session(backend, opening)
    try:
        attach_saved(session, saved, folder)
        assert session.judge is not None
        session.judge.load_head(saved.head)
        yield ModelReward(session.judge, open_tokenizer(_tokenizer_folder(folder, base)))
    finally:
        session.close()


def _tokenizer_folder(folder: Path, base: Path) -> Path:
    return folder if (folder / "tokenizer_config.json").is_file() else base


_CALL = "a reward is called as `function(completion, row)` and returns a number."


class _Source(SourceFileLoader):
    """Reads the file as it is, and leaves no compiled copy beside it."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


@frozen(eq=False)
class FileReward:
    """`function(completion, row)`, called for one answer after the other."""

    name: str
    path: Path
    function: Callable[[str, dict[str, Any]], Any]

    def check(self, rows: Sequence[Row]) -> None:
        """The function alone knows what it needs of a row."""

    def earned(self, answers: Sequence[Answer]) -> list[float]:
        """What the function returns. Raises ConfigError for what goes wrong in it, with file and line."""
        return [self._number(answer) for answer in answers]

    def _number(self, answer: Answer) -> float:
        row = answer.row
        value = _run(
            self.path,
            f"`{self.name}` fails on the row {row.source}",
            lambda: self.function(answer.text, dict(row.extra.columns)),
        )
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(
                "reward-not-a-number",
                f"`{self.name}` returns {str(value)[:60]} for the row {row.source}",
                where=str(self.path),
                help=_CALL,
            )
        return number


def load_reward(reward: str) -> FileReward:
    """The function that `./rewards.py:function` names. Running the file is what the config asks for.

    Raises ConfigError for a file that is not there, does not run, or has no such function.
    """
    path_text, name = file_function(reward) or ("", "")
    path = local_path(path_text)
    if not path.is_file():
        raise ConfigError(
            "reward-file",
            "no such file",
            where=str(path),
            help="`training.rewards` names it; check the path.",
        )
    module = _module(path)
    function = getattr(module, name, None)
    if not callable(function):
        names = tuple(key for key, value in vars(module).items() if callable(value))
        raise ConfigError(
            "reward-file",
            f"has no function `{name}`",
            where=str(path),
            help=did_you_mean(name, names) or _CALL,
        )
    return FileReward(name, path, function)


def reward_marks(config: Config) -> list[tuple[str, str]]:
    """What the rewards' files hold, as settings: a resumed run must earn what it would have earned."""
    files = [found[0] for reward in config.training.rewards if (found := file_function(reward))]
    paths = {f"training.rewards {file}": local_path(file) for file in files}
    if config.training.reward_model is not None:
        folder = adapter_folder(local_path(config.training.reward_model))
        paths["training.reward_model weights"] = folder / WEIGHTS
    return [
        (name, hashlib.sha256(path.read_bytes()).hexdigest())
        for name, path in paths.items()
        if path.is_file()
    ]


def _module(path: Path) -> ModuleType:
    name = f"soupx_rewards_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader
    # Data classes and the like look their module up.
    sys.modules[name] = module
    _run(path, "the file does not run", lambda: loader.exec_module(module))
    return module


def _run(path: Path, what: str, call: Callable[[], Any]) -> Any:
    """The person's own code, whatever it raises: one message with the line in their file."""
    try:
        return call()
    except MemoryError:
        raise
    except SyntaxError as error:
        raise _failed(f"{path}:{error.lineno or 1}", what, error.msg, error) from error
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f"{path}:{frames[-1].lineno}" if frames else str(path)
        raise _failed(place, what, str(error), error) from error


def _failed(place: str, what: str, text: str, error: BaseException) -> ConfigError:
    lines = text.strip().splitlines()
    detail = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return ConfigError("reward-failed", f"{what}: {detail}", where=place, help=_CALL)
