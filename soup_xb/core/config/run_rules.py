"""What cannot be combined in the rows, schedule, folders and rewards of a run, and with a streamed dataset."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator

from soup_xb.core.config.rules import Rule, excluded
from soup_xb.core.config.schema import Config, LoadedConfig, value_of
from soup_xb.core.errors import ConfigError, Problem
from soup_xb.core.objectives.answer_pattern import BUILT_IN, compiled_pattern
from soup_xb.core.tasks import TASKS, readers
from soup_xb.core.text import did_you_mean

_LOCAL_PATH = re.compile(
    r"[./~\\]|[A-Za-z]:\\|.*\.(jsonl?|ndjson|csv|tsv|parquet|txt|gz|zst)$", re.IGNORECASE | re.DOTALL
)


def is_local_path(name: str) -> bool:
    """Whether `data.train` names a file rather than a dataset on the hub, judged by its spelling alone.

    >>> is_local_path("./rows"), is_local_path("rows.jsonl"), is_local_path("tatsu-lab/alpaca")
    (True, True, False)
    """
    return _LOCAL_PATH.match(name) is not None


def _rewarm_fits(loaded: LoadedConfig) -> Iterator[Problem]:
    training = loaded.config.training
    rewarm, every = training.relora_rewarm_steps, training.relora_steps
    if rewarm is not None and every is not None and rewarm >= every:
        yield Problem(
            "contradiction",
            f"must be below `training.relora_steps` ({every}), got {rewarm}",
            loaded.where("training.relora_rewarm_steps"),
            "the learning rate would never reach its height between two restarts.",
        )


def _merge_needs_an_open_base(loaded: LoadedConfig) -> Iterator[Problem]:
    training = loaded.config.training
    if training.relora_steps is None or training.relora_mode != "merge":
        return
    if training.quantization != "none":
        reason = "a quantized base cannot take an adapter in without rounding it away"
        yield excluded(loaded, ("training.relora_mode", "`merge`"), "training.quantization", reason)
    if training.lora.use_dora:
        reason = "DoRA changes whole rows of a weight, which no sum of LoRA pieces can say"
        yield excluded(loaded, ("training.relora_mode", "`merge`"), "training.lora.use_dora", reason)
    if not training.relora_reset_optimizer:
        reason = "the new factors have nothing in common with the optimizer state of the old ones"
        keys = ("training.relora_reset_optimizer", "`false`")
        yield excluded(loaded, keys, "training.relora_mode", reason)


def _one_held_out_set(loaded: LoadedConfig) -> Iterator[Problem]:
    data = loaded.config.data
    if data.eval and data.val_split > 0:
        reason = "the rows to evaluate on come from one place"
        yield excluded(loaded, ("data.val_split", f"{data.val_split:g}"), "data.eval", reason)


def _evaluation_has_rows(loaded: LoadedConfig) -> Iterator[Problem]:
    data = loaded.config.data
    if loaded.config.training.eval_steps is not None and not data.eval and data.val_split == 0:
        yield Problem(
            "contradiction",
            "there are no rows to evaluate on",
            loaded.where("training.eval_steps"),
            "write `data.eval` or `data.val_split`, or remove `training.eval_steps`.",
        )


def _split_of_a_hub_dataset(loaded: LoadedConfig) -> Iterator[Problem]:
    data = loaded.config.data
    if not all(is_local_path(path) for path in data.train):
        return
    for key, on in (("data.split", data.split != "train"), ("data.subset", data.subset is not None)):
        if on:
            yield Problem(
                "key-without-effect",
                "belongs to a dataset on the hub, and `data.train` is a local file",
                loaded.where(key),
                "remove it, or name a hub dataset in `data.train`.",
            )


def _format_fits_task(loaded: LoadedConfig) -> Iterator[Problem]:
    task, written = TASKS[loaded.config.task], loaded.config.data.format
    if written == "auto" or written in task.formats:
        return
    yield Problem(
        "contradiction",
        f"`{written}` rows are for {', '.join(readers(written))}, and `task` is `{task.name}`",
        loaded.where("data.format"),
        f"use `format: auto` with rows of {' or '.join(task.formats)}.",
    )


def _columns_are_read(loaded: LoadedConfig) -> Iterator[Problem]:
    task, data = TASKS[loaded.config.task], loaded.config.data
    known = task.columns(data.format)
    for name in data.columns if known else ():
        if name not in known:
            rows = (
                f"rows of the format {data.format}"
                if data.format != "auto"
                else f"rows of `task: {task.name}`"
            )
            yield Problem(
                "unknown-column",
                f"{rows} have no such column; our name comes first, the file's second",
                loaded.where(f"data.columns.{name}"),
                did_you_mean(name, known) or f"our names: {', '.join(known)}.",
            )


def _packing_fits_task(loaded: LoadedConfig) -> Iterator[Problem]:
    task = TASKS[loaded.config.task]
    if loaded.config.data.packing and task.packing == "never":
        yield excluded(loaded, ("data.packing", "`true`"), "task", task.no_packing)


def _output_is_its_own(loaded: LoadedConfig) -> Iterator[Problem]:
    config = loaded.config
    for key, folder in (("base", config.base), ("adapter", config.adapter)):
        if folder is not None and os.path.normpath(folder) == os.path.normpath(config.output):
            yield Problem(
                "contradiction",
                f"is the folder of `{key}`, which the run would write into",
                loaded.where("output"),
                "name another folder.",
            )


def _rope_has_a_factor(loaded: LoadedConfig) -> Iterator[Problem]:
    scaling = loaded.config.training.rope_scaling
    if scaling.type != "none" and scaling.factor is None:
        yield Problem(
            "missing-key",
            f"`type: {scaling.type}` needs a `factor`",
            loaded.where("training.rope_scaling.type"),
            "write `training.rope_scaling.factor`: how many times longer rows may be than the base was made for.",
        )


def _vectors_from_the_base_as_it_stands(loaded: LoadedConfig) -> Iterator[Problem]:
    scaling = loaded.config.training.rope_scaling
    if scaling.type != "none" and TASKS[loaded.config.task].embeds:
        reason = "sentence-transformers opens the base as it stands"
        yield excluded(loaded, ("training.rope_scaling.type", f"`{scaling.type}`"), "task", reason)


def _warmup_ends(loaded: LoadedConfig) -> Iterator[Problem]:
    training = loaded.config.training
    warmup, steps = training.warmup_steps, training.max_steps
    if warmup is not None and steps is not None and warmup >= steps:
        yield Problem(
            "warmup-never-ends",
            f"{warmup} steps of warm-up in a run of {steps} steps: the learning rate never falls",
            loaded.where("training.warmup_steps"),
        )


def _evaluated_on_other_rows(loaded: LoadedConfig) -> Iterator[Problem]:
    data = loaded.config.data
    shared = [path for path in data.eval if path in data.train]
    if shared:
        yield Problem(
            "eval-is-train",
            f"`{shared[0]}` is also trained on, so its loss says little",
            loaded.where("data.eval"),
            "evaluate on rows that are held out.",
        )


def _template_is_used(loaded: LoadedConfig) -> Iterator[Problem]:
    data = loaded.config.data
    plain = data.format in ("text", "prompt-completion") or TASKS[loaded.config.task].embeds
    if data.chat_template is not None and plain:
        yield Problem(
            "key-without-effect",
            "such rows are used without a chat template",
            loaded.where("data.chat_template"),
        )


RUN_RULES = (
    Rule(_rewarm_fits, ("training.relora_steps", "training.relora_rewarm_steps", "training.relora_mode")),
    Rule(
        _merge_needs_an_open_base,
        (
            "training.relora_steps",
            "training.relora_mode",
            "training.relora_reset_optimizer",
            "training.quantization",
            "training.lora.use_dora",
        ),
    ),
    Rule(_one_held_out_set, ("data.eval", "data.val_split")),
    Rule(_evaluation_has_rows, ("training.eval_steps", "data.eval", "data.val_split")),
    Rule(_split_of_a_hub_dataset, ("data.train", "data.split", "data.subset")),
    Rule(_format_fits_task, ("data.format", "task")),
    Rule(_columns_are_read, ("data.columns", "data.format", "task")),
    Rule(_packing_fits_task, ("data.packing", "task")),
    Rule(_rope_has_a_factor, ("training.rope_scaling.type", "training.rope_scaling.factor")),
    Rule(_vectors_from_the_base_as_it_stands, ("training.rope_scaling.type", "task")),
    Rule(_output_is_its_own, ("base", "adapter", "output")),
    Rule(_warmup_ends, ("training.warmup_steps", "training.max_steps"), warning=True),
    Rule(_evaluated_on_other_rows, ("data.train", "data.eval"), warning=True),
    Rule(_template_is_used, ("task", "data.format", "data.chat_template"), warning=True),
)


_STREAMING = "data.streaming"
STREAMED_FILE = (
    "is a local file, and there is nothing to stream: local files are read where they are and tokenized into the cache",
    "remove `data.streaming`, or name a dataset on the hub.",
)


def _steps_are_known(loaded: LoadedConfig) -> Iterator[Problem]:
    if loaded.config.data.streaming and loaded.config.training.max_steps is None:
        yield Problem(
            "streaming-without-steps",
            "needs `training.max_steps`: how many rows are read follows from the steps, and epochs count the whole",
            loaded.where(_STREAMING),
            "write `training.max_steps`, or remove `data.streaming`.",
        )


def _data_is_on_the_hub(loaded: LoadedConfig) -> Iterator[Problem]:
    data = loaded.config.data
    if not data.streaming:
        return
    local = [path for path in data.train if is_local_path(path)]
    if local:
        text, help = STREAMED_FILE
        yield Problem("streaming-local-data", f"`{local[0]}` {text}", loaded.where("data.train"), help)
    elif len(data.train) > 1:
        yield Problem(
            "streaming-several",
            f"names {len(data.train)} datasets, and steps are filled from one: no key says how many rows each gives",
            loaded.where("data.train"),
            "name one of them, or remove `data.streaming`.",
        )


def _held_out_rows_are_at_hand(loaded: LoadedConfig) -> Iterator[Problem]:
    data = loaded.config.data
    remote = [path for path in data.eval if "/" in path and not is_local_path(path)]
    if data.streaming and remote:
        yield Problem(
            "streaming-eval",
            f"`{remote[0]}` would be downloaded whole: an evaluation takes all of its rows",
            loaded.where("data.eval"),
            "name a local file, or hold streamed rows out by `data.val_split`.",
        )


def _rows_are_whole(loaded: LoadedConfig) -> Iterator[Problem]:
    kind = TASKS[loaded.config.task].media
    if loaded.config.data.streaming and kind:
        reason = f"its rows name {kind} files, which are read from a local folder when their step comes"
        yield excluded(loaded, (_STREAMING, "`true`"), "task", reason)


STREAMING_RULES = (
    Rule(_steps_are_known, (_STREAMING, "training.max_steps")),
    Rule(_data_is_on_the_hub, (_STREAMING, "data.train")),
    Rule(_held_out_rows_are_at_hand, (_STREAMING, "data.eval")),
    Rule(_rows_are_whole, (_STREAMING, "task")),
)


_REWARD_FILE = re.compile(r"(?P<path>.+\.py):(?P<function>[^\W\d]\w*)", re.DOTALL)
_REWARD_FORM = "write `exact-match`, `format`, or a function of yours as `./rewards.py:function`."


def file_function(reward: str) -> tuple[str, str] | None:
    """Path and function of a reward that is a person's own, None for any other text.

    >>> file_function("./rewards.py:short"), file_function("format")
    (('./rewards.py', 'short'), None)
    """
    match = _REWARD_FILE.fullmatch(reward)
    return (match["path"], match["function"]) if match else None


def _required_keys_are_written(loaded: LoadedConfig) -> Iterator[Problem]:
    task = TASKS[loaded.config.task]
    for required in task.required:
        if not value_of(loaded.config, required.key):
            message = f"`task: {task.name}` {required.because}"
            yield Problem("missing-key", message, loaded.where(required.key), required.help)


def _rewards_are_known(loaded: LoadedConfig) -> Iterator[Problem]:
    rewards = loaded.config.training.rewards
    for reward in rewards:
        if reward not in BUILT_IN and file_function(reward) is None:
            yield Problem(
                "unknown-reward",
                f"`{reward}` is no reward",
                loaded.where("training.rewards"),
                did_you_mean(reward[:60], BUILT_IN) or _REWARD_FORM,
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


def reads_pattern(config: Config) -> bool:
    """Whether one of the rewards looks for `training.answer_pattern`."""
    return bool(set(config.training.rewards) & set(BUILT_IN))


def _pattern_is_read(loaded: LoadedConfig) -> Iterator[Problem]:
    if "training.answer_pattern" not in loaded.written or not TASKS[loaded.config.task].samples:
        return
    if not reads_pattern(loaded.config):
        yield Problem(
            "key-without-effect",
            "has no effect without the reward `exact-match` or `format`",
            loaded.where("training.answer_pattern"),
            "remove it, or name one of the two in `training.rewards`.",
        )


def _only_rollouts_go_without_a_base(loaded: LoadedConfig) -> Iterator[Problem]:
    task = TASKS[loaded.config.task]
    if loaded.config.training.beta == 0 and "beta" in task.settings and not task.samples:
        yield Problem(
            "contradiction",
            f"must be above 0 for `task: {task.name}`, got 0",
            loaded.where("training.beta"),
        )


REWARD_RULES = (
    Rule(_required_keys_are_written, ("task", "training.rewards", "training.reward_model")),
    Rule(_rewards_are_known, ("training.rewards",)),
    Rule(_pattern_is_one, ("training.answer_pattern",)),
    Rule(_pattern_is_read, ("task", "training.rewards", "training.answer_pattern")),
    Rule(_only_rollouts_go_without_a_base, ("task", "training.beta")),
)
