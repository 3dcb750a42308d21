"""The config's classes, with every key's default and range, and which key a misspelt or foreign name means."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from attrs import NOTHING, field, frozen

from soup_xb.core.config.keys import (
    Key,
    Range,
    choice,
    declared,
    integer,
    names,
    number,
    paths,
    ranks,
    section,
    switch,
)
from soup_xb.core.config.keys import targets as target_patterns
from soup_xb.core.config.keys import text as words
from soup_xb.core.errors import Problem
from soup_xb.core.tasks import FORMATS, TASKS
from soup_xb.core.text import close_names

POOLINGS = ("auto", "mean", "cls", "last")
EVERY_LINEAR = ("auto", "all-linear")
AUTOMATIC = (*EVERY_LINEAR, "auto+experts")

_SHARE = Range(0, 1, below=True)
_INNER_SHARE = Range(0, 1, above=True, below=True)
# Twice the largest rank: alpha = 2 r is the widest convention in use.
_LARGEST_ALPHA = 2048
_LARGEST_SEED = 2**32 - 1
_MOST_STEPS = 100_000_000


@frozen(kw_only=True)
class LoraConfig:
    """`training.lora`: the adapter."""

    r: int = integer(16, "Rank of the adapter.", 1, 1024)
    alpha: int = integer(32, "The adapter is added times alpha / r.", 1, _LARGEST_ALPHA)
    dropout: float = number(0.0, "Share of the adapter's inputs zeroed in training.", _SHARE)
    target_modules: str | tuple[str, ...] = target_patterns(
        "auto",
        AUTOMATIC,
        "Modules to adapt: `auto` (every linear layer of the decoder blocks), `auto+experts` (the 3-D expert weights "
        "too), a pattern, or a list of them.",
    )
    init_strategy: str = choice(
        "random",
        ("random", "pissa", "olora"),
        "Where the factors start: random, top singular triplets (pissa), or thin QR (olora).",
    )
    rank_pattern: Mapping[str, int] = ranks("Rank of the modules that match a pattern; the first match wins.")
    alpha_pattern: Mapping[str, int] = ranks(
        "Alpha of the modules that match a pattern; the first match wins."
    )
    use_rslora: bool = switch(False, "Scale by alpha / sqrt(r) instead of alpha / r.")
    use_dora: bool = switch(False, "Train the magnitude of each weight row beside its direction (DoRA).")
    use_vera: bool = switch(False, "Share one frozen pair of factors and train only scaling vectors (VeRA).")
    use_olora: bool = switch(False, "The older spelling of `init_strategy: olora`.")

    @property
    def start(self) -> str:
        """Where the factors start, whichever key says so."""
        return "olora" if self.use_olora else self.init_strategy


@frozen(kw_only=True)
class RopeScalingConfig:
    """`training.rope_scaling`: rotary positions for rows longer than the base was made for."""

    type: str = choice(
        "none",
        ("none", "linear", "dynamic", "yarn"),
        "How the base's rotary positions are stretched, as transformers' `rope_type` says it; the adapter then "
        "belongs to the base with this setting.",
    )
    factor: float | None = number(
        None, "Times the length that the base was made for.", Range(1, 1000, above=True)
    )
    original_max_position_embeddings: int | None = integer(
        None, "yarn: the length that the base was made for. Absent: its `max_position_embeddings`.", 1, 2**24
    )


@frozen(kw_only=True)
class DataConfig:
    """`data`: the rows to learn from."""

    train: tuple[str, ...] = paths(NOTHING, "Training rows: a file, a list of files, or a hub dataset id.")
    eval: tuple[str, ...] = paths((), "Held-out rows to evaluate on: a file or a list of files.")
    format: str = choice("auto", ("auto", *FORMATS), "How a row is written; `auto` looks at the columns.")
    columns: Mapping[str, str] = names(
        "Columns of the rows that have other names there, ours first: `{instruction: question, output: answer}`."
    )
    split: str = words("train", "Split of a hub dataset.")
    subset: str | None = words(None, "Subset (configuration name) of a hub dataset.")
    streaming: bool = switch(
        False,
        "Of a hub dataset, read over the network only the rows that `max_steps` trains on, instead of downloading it.",
    )
    val_split: float = number(0.0, "Share of the training rows held out for evaluation.", _SHARE)
    max_length: int = integer(2048, "Longest row in tokens; what is longer is cut.", 2, 1_048_576)
    packing: bool = switch(
        False,
        "Put several rows into one sequence of `max_length`, kept apart in attention; `pretrain` always does.",
    )
    chat_template: str | None = words(None, "Jinja chat template for a base that has none: text or a file.")
    train_on: str = choice(
        "answers",
        ("answers", "last", "all"),
        "sft, vision, audio: the tokens to learn: the assistant's `answers`, the `last` answer of each row, or `all`.",
    )
    query_prompt: str | None = words(None, "embedding: text before every anchor, such as `query: `.")
    document_prompt: str | None = words(
        None, "embedding: text before every positive and negative, such as `passage: `."
    )


@frozen(kw_only=True)
class TrainingConfig:
    """`training`: how the adapter learns."""

    epochs: int = integer(3, "Passes over the training rows; `max_steps` wins where it is given.", 1, 10_000)
    max_steps: int | None = integer(None, "Optimizer updates to do, whatever the epochs.", 1, _MOST_STEPS)
    lr: float = number(2e-4, "Highest learning rate.", Range(0, 1, above=True))
    batch_size: int = integer(4, "Rows of one micro-batch, over all processes.", 1, 65_536)
    gradient_accumulation_steps: int = integer(1, "Micro-batches of one optimizer update.", 1, 65_536)
    scheduler: str = choice(
        "cosine", ("linear", "cosine", "constant"), "How the learning rate falls after the warm-up."
    )
    warmup_ratio: float = number(0.0, "Share of the steps in which the learning rate rises.", _SHARE)
    warmup_steps: int | None = integer(None, "Steps in which the learning rate rises.", 0, _MOST_STEPS)
    weight_decay: float = number(0.01, "Decoupled weight decay of the adapter.", Range(0, 1))
    max_grad_norm: float = number(
        1.0, "Longest gradient; longer ones are scaled down. 0: off.", Range(0, 1e9)
    )
    optimizer: str = choice("adamw", ("adamw", "sgd"), "The optimizer.")
    adam_beta1: float = number(0.9, "AdamW: decay of the gradient's mean.", _SHARE)
    adam_beta2: float = number(0.999, "AdamW: decay of the squared gradient's mean.", _SHARE)
    adam_epsilon: float = number(1e-8, "AdamW: term that keeps the division finite.", Range(0, 1, above=True))
    seed: int = integer(42, "Seed of the row order, the adapter's start and dropout.", 0, _LARGEST_SEED)
    precision: str = choice(
        "auto",
        ("auto", "fp32", "bf16", "fp16"),
        "Number format; `auto`: fp32 on a CPU, bf16 on CUDA and Metal.",
    )
    quantization: str = choice(
        "none", ("none", "4bit", "8bit"), "Quantize the base while loading, in the backend's own format."
    )
    sharding: str = choice(
        "none",
        ("none", "fsdp"),
        "How several processes hold the base: each the whole of it, or each a part of every block (FSDP2).",
    )
    cpu_offload: bool = switch(
        False, "fsdp: keep each process's part of the base in CPU memory between its uses."
    )
    process_timeout: int = integer(
        1800, "Seconds that one of several processes waits for the others before the run ends.", 1, 86_400
    )
    gradient_checkpointing: bool = switch(False, "Recompute activations going backward: less memory, slower.")
    eval_steps: int | None = integer(None, "Evaluate every so many steps.", 1, _MOST_STEPS)
    save_steps: int | None = integer(None, "Write a checkpoint every so many steps.", 1, _MOST_STEPS)
    save_total_limit: int | None = integer(None, "Checkpoints to keep, the newest ones.", 1, _MOST_STEPS)
    logging_steps: int = integer(
        10, "Show progress every so many steps; `metrics.jsonl` has every step.", 1, _MOST_STEPS
    )
    relora_steps: int | None = integer(
        None, "ReLoRA: restart the adapter every so many steps. Absent: off.", 1, _MOST_STEPS
    )
    relora_warmup_ratio: float = number(0.1, "ReLoRA: share of the steps before the first restart.", _SHARE)
    relora_prune_ratio: float = number(0.9, "ReLoRA: share of the factors that a prune zeroes.", _INNER_SHARE)
    relora_reset_optimizer: bool = switch(True, "ReLoRA: start the optimizer state afresh at a restart.")
    relora_mode: str = choice(
        "prune",
        ("prune", "merge"),
        "ReLoRA: zero small entries, or merge the adapter and begin a new one.",
    )
    relora_rewarm_steps: int | None = integer(
        None,
        "ReLoRA merge: steps of warm-up after a restart; absent: a tenth of `relora_steps`.",
        1,
        _MOST_STEPS,
    )
    beta: float | None = number(
        None,
        "Preference tasks: scale of the rewards; with a reference, how strongly the model is held to the base (orpo: "
        "weight of the odds ratio). grpo, rlhf: weight of the KL divergence from the base, 0 for none. Absent: 0.1, "
        "for simpo 2, for grpo and rlhf 0.04.",
        Range(0, 1000),
    )
    label_smoothing: float = number(
        0.0,
        "dpo, simpo, cpo: share of the pairs taken to be labelled the wrong way round.",
        Range(0, 0.5, below=True),
    )
    simpo_gamma: float = number(1.0, "simpo: margin by which a chosen answer should win.", Range(0, 1000))
    cpo_alpha: float | None = number(
        None,
        "cpo, simpo: weight of the likelihood of the chosen answer beside the preference. Absent: 1, for simpo 0.",
        Range(0, 1000),
    )
    desirable_weight: float = number(1.0, "kto: weight of the desirable answers.", Range(0, 1000))
    undesirable_weight: float = number(1.0, "kto: weight of the undesirable answers.", Range(0, 1000))
    pooling: str = choice(
        "auto",
        POOLINGS,
        "embedding: which tokens make a text's vector; `auto`: as the base's own sentence-transformers files say, else "
        "the mean on an encoder and the last token on a decoder.",
    )
    embedding_scale: float | None = number(
        None,
        "embedding: what cosines are multiplied by, one over the temperature. Absent: 20.",
        Range(0, 1000, above=True),
    )
    router_aux_loss_coef: float | None = number(
        None,
        "Mixtures of experts: weight of the loss that spreads tokens over the experts. Absent: off.",
        Range(0, 10, above=True),
    )
    rope_scaling: RopeScalingConfig = field(
        factory=RopeScalingConfig,
        metadata=section(RopeScalingConfig, "Positions for rows longer than the base was made for."),
    )
    rewards: tuple[str, ...] = paths(
        (),
        "grpo, rlhf: what an answer earns, summed: `exact-match`, `format`, or a function of yours as "
        "`./rewards.py:function`.",
    )
    reward_model: str | None = words(
        None, "rlhf: the output folder of a `task: reward` run; what its model thinks of an answer is earned."
    )
    answer_pattern: str = words(
        r"<answer>(.*?)</answer>",
        "grpo, rlhf: regular expression that finds the answer in what the model wrote; its first group is the answer.",
    )
    group_size: int = integer(8, "grpo, rlhf: answers that are sampled to each prompt.", 2, 1024)
    max_new_tokens: int = integer(256, "grpo, rlhf: longest sampled answer, in tokens.", 1, 65_536)
    temperature: float = number(
        1.0, "grpo, rlhf: the logits are divided by it where answers are sampled.", Range(0, 100, above=True)
    )
    scale_rewards: bool = switch(
        True, "grpo, rlhf: divide a group's advantages by the standard deviation of its rewards."
    )
    lora: LoraConfig = field(factory=LoraConfig, metadata=section(LoraConfig, "The adapter."))


@frozen(kw_only=True)
class Config:
    """A whole `soup.yaml`, immutable, every default filled in."""

    base: str = words(NOTHING, "The model to fine-tune: a hub id or a local folder.")
    task: str = choice("sft", tuple(TASKS), "What to train for: `sft` learns answers, `pretrain` plain text.")
    backend: str = choice(
        "auto",
        ("auto", "torch", "mlx"),
        "The engine; `auto`: mlx on Apple silicon where it can, else torch.",
    )
    data: DataConfig = field(metadata=section(DataConfig, "The rows to learn from.", required=True))
    training: TrainingConfig = field(
        factory=TrainingConfig, metadata=section(TrainingConfig, "How the adapter learns.")
    )
    adapter: str | None = words(None, "Folder of a saved adapter to start from.")
    output: str = words("./output", "Folder that the run writes to.")


KEYS: Mapping[str, Key] = MappingProxyType(dict(declared(Config)))


def value_of(config: Config, key: str) -> Any:
    """The value under a dotted key.

    >>> value_of(Config(base="tiny", data=DataConfig(train="rows.jsonl")), "training.lora.r")
    16
    """
    return attrgetter(key)(config)


# What transformers, PEFT, mlx-lm, Axolotl and LLaMA-Factory call our keys.
FOREIGN_NAMES = {
    "adapter_path": "adapter",
    "alpha": "training.lora.alpha",
    "base_model": "base",
    "bf16": "training.precision",
    "column_mapping": "data.columns",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "datasets": "data.train",
    "dropout": "training.lora.dropout",
    "dtype": "training.precision",
    "eval_dataset": "data.eval",
    "eval_file": "data.eval",
    "fp16": "training.precision",
    "grad_accumulation_steps": "training.gradient_accumulation_steps",
    "gradient_clipping": "training.max_grad_norm",
    "init_lora_weights": "training.lora.init_strategy",
    "iters": "training.max_steps",
    "learning_rate": "training.lr",
    "load_in_4bit": "training.quantization",
    "load_in_8bit": "training.quantization",
    "lora_alpha": "training.lora.alpha",
    "lora_dropout": "training.lora.dropout",
    "lora_r": "training.lora.r",
    "lora_rank": "training.lora.r",
    "lora_target": "training.lora.target_modules",
    "lora_target_modules": "training.lora.target_modules",
    "lr_scheduler": "training.scheduler",
    "lr_scheduler_type": "training.scheduler",
    "mask_history": "data.train_on",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "micro_batch_size": "training.batch_size",
    "model": "base",
    "model_name": "base",
    "model_name_or_path": "base",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "optim": "training.optimizer",
    "output_dir": "output",
    "per_device_train_batch_size": "training.batch_size",
    "rank": "training.lora.r",
    "sample_packing": "data.packing",
    "save_every": "training.save_steps",
    "sequence_len": "data.max_length",
    "steps_per_eval": "training.eval_steps",
    "steps_per_report": "training.logging_steps",
    "train_file": "data.train",
    "train_on_inputs": "data.train_on",
    "train_on_prompt": "data.train_on",
    "use_dora": "training.lora.use_dora",
    "use_rslora": "training.lora.use_rslora",
    "val_set_size": "data.val_split",
    "validation_file": "data.eval",
}
# Nothing longer is a slip of the keyboard, and comparing it would take long.
_LONGEST_NAME = 60


def suggestion(name: str, section: str, dotted: bool = False) -> str:
    """A question naming the keys that `name`, written in `section` ("" at the top), may stand for.

    A key of the same section is named without the section, except where `dotted` asks for it.

    >>> suggestion("learing_rate", "training")
    'did you mean `lr`?'
    >>> suggestion("lora_r", "training")
    'did you mean `training.lora.r`?'
    """
    name = name.strip().lower().replace("-", "_")
    if not name or len(name) > _LONGEST_NAME:
        return ""
    found = list(dict.fromkeys(_meant(name, section)))[:3]
    if not found:
        return ""
    spelled = found if dotted else [_short(key, section) for key in found]
    return f"did you mean {' or '.join(f'`{key}`' for key in spelled)}?"


def _short(key: str, section: str) -> str:
    parent, _, name = key.rpartition(".")
    return name if parent == section else key


def _meant(name: str, section: str) -> list[str]:
    if name in KEYS:
        return [name]
    if name in FOREIGN_NAMES:
        return [FOREIGN_NAMES[name]]
    elsewhere = [key for key in KEYS if key.rpartition(".")[2] == name]
    if elsewhere:
        return elsewhere
    here = {key.rpartition(".")[2]: key for key in KEYS if key.rpartition(".")[0] == section}
    names = FOREIGN_NAMES | {key.rpartition(".")[2]: key for key in KEYS}
    close = [here[other] for other in close_names(name, here, 2)]
    close += [names[other] for other in close_names(name, names, 2)]
    return [key for key in close if key in here.values()] or close


COMMAND_LINE = "command line"


def place(source: str, written: Mapping[str, int], key: str) -> str:
    """Where `key` stands: `soup.yaml:7: training.lr`, without a line for a key that is not written.

    >>> place("soup.yaml", {"training.lr": 7, "base": 0}, "training.lr")
    'soup.yaml:7: training.lr'
    >>> place("soup.yaml", {"training.lr": 7, "base": 0}, "base")
    'command line: base'
    """
    line = written.get(key)
    if line is None:
        return f"{source}: {key}"
    return f"{source}:{line}: {key}" if line else f"{COMMAND_LINE}: {key}"


@frozen
class LoadedConfig:
    """A checked config and its origin.

    `written` maps each dotted key that has a value in the file to its line (from 1), entries of the pattern
    maps included (`training.lora.rank_pattern.q_proj`); the line is 0 where the command line set the key.
    """

    config: Config
    source: str
    written: Mapping[str, int]
    warnings: tuple[Problem, ...] = ()

    def where(self, key: str) -> str:
        """The place of a dotted key, for the `where` of a Problem."""
        return place(self.source, self.written, key)
