"""A saved adapter on a file of rows beside its untouched base, by the measures of its run's own evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from attrs import evolve, frozen

from soup_xb.core.adapter.peft_file import adapter_folder, read_adapter
from soup_xb.core.config.load import LoadedConfig, recorded_config
from soup_xb.core.config.run_rules import file_function
from soup_xb.core.config.schema import Config
from soup_xb.core.disk import local_path
from soup_xb.core.errors import ConfigError, DataError, Problem
from soup_xb.core.objectives import losses
from soup_xb.core.objectives.objective import ScoreObjective
from soup_xb.core.objectives.rewards import Reward
from soup_xb.core.rows.files import read_rows
from soup_xb.core.rows.formats.detect import ExampleReader
from soup_xb.core.rows.formats.every import formats_named
from soup_xb.core.rows.judged import learned_rows
from soup_xb.core.rows.table import Rows
from soup_xb.core.run.plan import held_out_batches, objective_of
from soup_xb.core.run.record import RECORD, read_record
from soup_xb.core.run.reference import base_log_probabilities
from soup_xb.core.run.rollouts import RolloutSession
from soup_xb.core.run.session import LossSum
from soup_xb.core.tasks import TASKS
from soup_xb.core.tasks.task import Task
from soup_xb.data.dataset import tokenize_as
from soup_xb.data.token_file import Reading
from soup_xb.runs.adapters import LoadedAdapter, TrainedOptions, open_trained
from soup_xb.runs.rewards import open_rewards, rollout_rules

# Of rows whose run does not say how long they may be.
_MAX_LENGTH = 2048


@frozen
class Held:
    """The rows to evaluate on, in a file.

    `columns` are our names for the file's. Without `max_length` it is the run's for the measures of its task, else
    2048. `rewards` take the place of those that the run names.
    """

    data: Path
    format: str = "auto"
    columns: Mapping[str, str] = MappingProxyType({})
    batch_size: int = 4
    max_length: int | None = None
    rewards: tuple[str, ...] = ()


@frozen
class Evaluation:
    """Losses and means by `base` and `adapter`, over `examples`, and what the user should know of the rows."""

    figures: Mapping[str, LossSum]
    notices: tuple[Problem, ...]
    examples: str = "rows"


def evaluate(options: TrainedOptions, held: Held) -> Evaluation:
    """Evaluate the adapter that `options` name, and its base.

    Rows of the run's own task (pairs, judged answers, prompts) give that task's measures, all others loss over tokens
    or, for an adapter that embeds, over texts. A reward model is measured alone: its base has no head. Raises
    ConfigError where answers would be judged by a file of code that only the run's own record names.
    """
    assert options.adapter is not None
    if read_adapter(adapter_folder(options.adapter)).head is not None:
        return _of_scores(options, held)
    place = _record_of(options.adapter)
    if place is not None:
        config = read_record(place).config
        task = TASKS.get(str(config.get("task")))
        if task is not None and task.kind in ("pair", "judged", "prompt") and _has_rows_of(task, held):
            return _of_answers(options, held, recorded_config(config, str(place)))
    _refuse_rewards(held, "the rows are no prompts of a run that samples answers")
    with open_trained(options) as trained:
        longest = held.max_length or _MAX_LENGTH
        if trained.embedding is not None:
            longest = min(longest, trained.embedding.max_length)
        reading = Reading(held.format, trained.formats, columns=held.columns)
        found = tokenize_as(held.data, reading, trained.tokenizer, longest)
        batches = held_out_batches(found.rows, held.batch_size, trained.tokenizer.pad_id)
        figures = {
            name: trained.session.evaluate(batches, adapter=with_adapter)
            for name, with_adapter in (("base", False), ("adapter", True))
        }
    return Evaluation(figures, found.notices)


def _record_of(adapter: Path) -> Path | None:
    """The `run.json` of the run that an adapter is in, None where it is in none."""
    folder = adapter_folder(adapter)
    places = [adapter, *([folder.parent] if folder.name == "adapter" else [])]
    return next((place / RECORD for place in places if (place / RECORD).is_file()), None)


def _has_rows_of(task: Task, held: Held) -> bool:
    """Whether the rows are of one of the task's formats, by the first of them where no format is given."""
    if held.format != "auto":
        return held.format in task.formats
    rows, formats = read_rows(local_path(str(held.data))), formats_named(task.formats)
    try:
        ExampleReader(rows, held.format, str(held.data), formats, held.columns)
    except DataError:
        return False
    return True


def _refuse_rewards(held: Held, why: str) -> None:
    if held.rewards:
        raise ConfigError("reward-without-answers", why, where="--reward", help="leave `--reward` out.")


def _of_scores(options: TrainedOptions, held: Held) -> Evaluation:
    """A reward model on pairs."""
    _refuse_rewards(held, "the adapter is a reward model, and samples no answers")
    task = TASKS["reward"]
    with open_trained(options, objective=ScoreObjective(losses.reward, {}, {})) as trained:
        rows, notices = _rows(task, held, trained, _MAX_LENGTH)
        batches = held_out_batches(rows, held.batch_size, trained.tokenizer.pad_id)
        return Evaluation({"adapter": trained.session.evaluate(batches)}, notices)


def _of_answers(options: TrainedOptions, held: Held, loaded: LoadedConfig) -> Evaluation:
    """A run's own measures: of pairs and judged answers, or of what the answers to prompts earn."""
    loaded = _with_rewards(loaded, held)
    config, task = loaded.config, TASKS[loaded.config.task]
    with (
        open_rewards(loaded, options.backend) as rewards,
        open_trained(options, objective=objective_of(config)) as trained,
    ):
        rows, notices = _rows(task, held, trained, config.data.max_length)
        pad_id = trained.tokenizer.pad_id
        known = None
        if task.needs_reference:
            sequences = len(rows[0].sequences)
            known = base_log_probabilities(trained.session, rows, sequences, held.batch_size, pad_id)
        batches = held_out_batches(rows, held.batch_size, pad_id, known)
        session = _sampling(config, trained, rewards, rows) if task.samples else trained.session
        figures = {
            name: session.evaluate(batches, adapter=with_adapter)
            for name, with_adapter in (("base", False), ("adapter", True))
        }
    return Evaluation(figures, notices, "answers" if task.samples else "rows")


def _rows(task: Task, held: Held, trained: LoadedAdapter, longest: int) -> tuple[Rows, tuple[Problem, ...]]:
    longest = held.max_length or longest
    reading = Reading(
        held.format, formats_named(task.formats), has_columns=not task.samples, columns=held.columns
    )
    found = tokenize_as(held.data, reading, trained.tokenizer, longest)
    return learned_rows(found.rows, task.kind, longest, task.needs_mismatched), found.notices


def _sampling(
    config: Config, trained: LoadedAdapter, rewards: Sequence[Reward], rows: Rows
) -> RolloutSession:
    return RolloutSession(trained.session, rollout_rules(config.training, trained.tokenizer, rewards, rows))


def _with_rewards(loaded: LoadedConfig, held: Held) -> LoadedConfig:
    """The run's config with the rewards that the command names.

    A run's folder may be another person's: the code that its record names runs only if the command names it too.
    """
    training, task = loaded.config.training, TASKS[loaded.config.task]
    if not task.samples:
        _refuse_rewards(held, f"`task: {task.name}` samples no answers")
        return loaded
    if held.rewards:
        named = evolve(training, rewards=held.rewards)
        return evolve(loaded, config=evolve(loaded.config, training=named))
    code = next((reward for reward in training.rewards if file_function(reward)), None)
    if code is not None:
        options = " ".join(f"--reward {reward}" for reward in training.rewards)
        raise ConfigError(
            "reward-not-named",
            f"the run's answers were judged by `{code}`, and a run's folder alone runs no code",
            where=loaded.where("training.rewards"),
            help=f"look at that file, and name it: {options}",
        )
    return loaded
