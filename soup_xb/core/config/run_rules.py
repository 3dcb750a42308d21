"""What cannot be combined in the rows, the schedule and the folders of a run."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator

from soup_xb.core.config.loaded import LoadedConfig
from soup_xb.core.config.rules import Rule, excluded
from soup_xb.core.config.schema import MEDIA_TASKS, PREFERENCE_TASKS, SAMPLED, TASKS, task_formats
from soup_xb.core.errors import Problem

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


def _pretraining_reads_text(loaded: LoadedConfig) -> Iterator[Problem]:
    data = loaded.config.data
    if loaded.config.task == "pretrain" and data.format not in ("auto", "text"):
        reason = "pretraining learns plain text, every token of it"
        yield excluded(loaded, ("data.format", f"`{data.format}`"), "task", reason)


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
    task, written = loaded.config.task, loaded.config.data.format
    if written == "auto" or written in task_formats(task):
        return
    readers = [one for one in TASKS if written in task_formats(one)]
    yield Problem(
        "contradiction",
        f"`{written}` rows are for {', '.join(readers)}, and `task` is `{task}`",
        loaded.where("data.format"),
        f"use `format: auto` with rows of {' or '.join(task_formats(task))}.",
    )


def _packing_keeps_files_apart(loaded: LoadedConfig) -> Iterator[Problem]:
    if loaded.config.data.packing and loaded.config.task in MEDIA_TASKS:
        reason = "pictures and sounds are matched to the tokens of a row, one row a sequence"
        yield excluded(loaded, ("data.packing", "`true`"), "task", reason)


def _packing_keeps_answers_apart(loaded: LoadedConfig) -> Iterator[Problem]:
    if loaded.config.data.packing and loaded.config.task in (*PREFERENCE_TASKS, *SAMPLED, "embedding"):
        reason = "what is compared are whole texts, each in a sequence of its own"
        yield excluded(loaded, ("data.packing", "`true`"), "task", reason)


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
    if scaling.type != "none" and loaded.config.task == "embedding":
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
    plain = data.format in ("text", "prompt-completion") or loaded.config.task == "embedding"
    if data.chat_template is not None and plain:
        yield Problem(
            "key-without-effect",
            "such rows are used without a chat template",
            loaded.where("data.chat_template"),
        )


RULES = (
    Rule(_pretraining_reads_text, ("task", "data.format")),
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
    Rule(_packing_keeps_answers_apart, ("data.packing", "task")),
    Rule(_rope_has_a_factor, ("training.rope_scaling.type", "training.rope_scaling.factor")),
    Rule(_vectors_from_the_base_as_it_stands, ("training.rope_scaling.type", "task")),
    Rule(_packing_keeps_files_apart, ("data.packing", "task")),
    Rule(_output_is_its_own, ("base", "adapter", "output")),
    Rule(_warmup_ends, ("training.warmup_steps", "training.max_steps"), warning=True),
    Rule(_evaluated_on_other_rows, ("data.train", "data.eval"), warning=True),
    Rule(_template_is_used, ("task", "data.format", "data.chat_template"), warning=True),
)
