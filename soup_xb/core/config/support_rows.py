"""What works on which backend: one row for each config key and for each choice of a key.

A row's name is the dotted key, or `key=choice`. A row whose choice is in words (`base=quantized by
bitsandbytes`) is about what only the opened base shows; the backend asks for it by name.
"""

from __future__ import annotations

from attrs import frozen

from soup_xb.core.base.proven import proven_types
from soup_xb.core.config.schema import KEYS
from soup_xb.core.tasks import FORMATS, TASKS, readers, tasks_with
from soup_xb.core.tasks.task import No

BACKENDS = ("torch", "mlx")


@frozen
class Row:
    """One feature. None stands for yes; `feature` is the word in the error code (`mlx-no-relora`).

    A row that `follows` another is a setting of that feature: it has the same answer, and is told once.
    """

    name: str
    feature: str = ""
    torch: No | None = None
    mlx: No | None = None
    follows: str = ""

    @property
    def key(self) -> str:
        """The dotted config key."""
        return self.name.partition("=")[0]

    @property
    def choice(self) -> str:
        """The choice of the key that the row is about, empty for the key as a whole."""
        return self.name.partition("=")[2]

    def answer(self, backend: str) -> No | None:
        """Why `backend` refuses, None where it does not."""
        answer: No | None = getattr(self, backend)
        return answer


def _works(*names: str) -> tuple[Row, ...]:
    return tuple(Row(name) for name in names)


def _choices(key: str, *choices: str) -> tuple[Row, ...]:
    return _works(key, *(f"{key}={choice}" for choice in choices))


def _refusal(tasks: tuple[str, ...], name: str) -> Row:
    """The row of what belongs to some tasks: refused where all of them are, as a setting of the first."""
    if not tasks or any(TASKS[task].mlx is None for task in tasks):
        return Row(name)
    first = TASKS[tasks[0]]
    return Row(name, first.feature, mlx=first.mlx, follows=f"task={first.name}")


def _with_choices(key: str) -> tuple[Row, ...]:
    """The rows of a key of some tasks, and of its choices."""
    names = (key, *(f"{key}={choice}" for choice in KEYS[key].choices))
    return tuple(_refusal(tasks_with(key), name) for name in names)


# Refused for another reason than its tasks.
_TOLD_APART = ("training.router_aux_loss_coef",)
_TASKS = (
    *_works("task"),
    *(Row(f"task={task.name}", task.feature, mlx=task.mlx) for task in TASKS.values()),
    *(row for key in KEYS if tasks_with(key) and key not in _TOLD_APART for row in _with_choices(key)),
    *_works("data.format", "data.format=auto"),
    *(_refusal(readers(name), f"data.format={name}") for name in FORMATS),
)

_RELORA_NO_MLX = No(
    "a merge changes weights of the base, which a compiled MLX step holds as constants, and both modes are one restart",
    "remove the `relora_*` keys.",
)
_RELORA = (
    Row("training.relora_steps", "relora", mlx=_RELORA_NO_MLX),
    *(
        Row(
            f"training.{name}",
            "relora",
            mlx=_RELORA_NO_MLX,
            follows="training.relora_steps",
        )
        for name in (
            "relora_warmup_ratio",
            "relora_prune_ratio",
            "relora_reset_optimizer",
            "relora_mode",
            "relora_mode=prune",
            "relora_mode=merge",
            "relora_rewarm_steps",
        )
    ),
)

_BACKENDS = _choices("backend", "auto", "torch", "mlx")

_DATA = (
    *_works(
        "data", "data.train", "data.eval", "data.split", "data.subset", "data.val_split", "data.max_length"
    ),
    *_works("data.columns", "data.packing", "data.chat_template", "data.streaming"),
)

# A loss scaler would skip the updates whose gradient overflows: not the run that the file describes.
_NO_FP16 = No(
    "gradients overflow in float16 unless updates are skipped, and a run here skips none",
    "use `precision: bf16`, which has the range of float32, or fp32.",
)

_NO_FSDP = No(
    "FSDP is torch's; processes of MLX share the rows, and each holds the whole base",
    "remove `training.sharding`, or quantize the base with `training.quantization: 4bit`.",
)
_NO_TIMEOUT = No(
    "the processes of an mlx ring wait for each other without a limit",
    "remove the key.",
)

_ROPE = (
    *_works("training.rope_scaling", "training.rope_scaling.factor"),
    *_choices("training.rope_scaling.type", "none", "linear", "yarn"),
    Row(
        "training.rope_scaling.type=dynamic",
        "dynamic-rope",
        mlx=No(
            "mlx-lm has no rope that changes with the length of a row",
            "use `type: yarn` or `type: linear`.",
        ),
    ),
    *_works("training.rope_scaling.original_max_position_embeddings"),
)

_TRAINING = (
    *_works("training", "training.epochs", "training.max_steps", "training.lr", "training.batch_size"),
    *_works("training.gradient_accumulation_steps", "training.gradient_checkpointing", "training.seed"),
    *_choices("training.scheduler", "linear", "cosine", "constant"),
    *_works(
        "training.warmup_ratio", "training.warmup_steps", "training.weight_decay", "training.max_grad_norm"
    ),
    *_choices("training.optimizer", "adamw", "sgd"),
    *_works("training.adam_beta1", "training.adam_beta2", "training.adam_epsilon"),
    *_choices("training.precision", "auto", "fp32", "bf16"),
    Row("training.precision=fp16", "fp16", torch=_NO_FP16, mlx=_NO_FP16),
    *_choices("training.quantization", "none", "4bit", "8bit"),
    *_choices("training.sharding", "none"),
    Row("training.sharding=fsdp", "fsdp", mlx=_NO_FSDP),
    Row("training.cpu_offload", "fsdp", mlx=_NO_FSDP, follows="training.sharding=fsdp"),
    Row("training.process_timeout", "process-timeout", mlx=_NO_TIMEOUT),
    Row(
        "training.router_aux_loss_coef",
        "router-loss",
        mlx=No(
            "mlx-lm's models do not give the logits of their routers, which the balancing loss is made of",
            "remove the key.",
        ),
    ),
    *_works(
        "training.eval_steps", "training.save_steps", "training.save_total_limit", "training.logging_steps"
    ),
)

_LORA = (
    *_works("training.lora", "training.lora.r", "training.lora.alpha", "training.lora.dropout"),
    *_choices("training.lora.target_modules", "auto", "all-linear", "auto+experts"),
    *_choices("training.lora.init_strategy", "random", "pissa", "olora"),
    *_works("training.lora.use_olora"),
    *_works("training.lora.rank_pattern", "training.lora.alpha_pattern"),
    *_works("training.lora.use_rslora", "training.lora.use_dora"),
    Row(
        "training.lora.use_vera",
        "vera",
        mlx=No("mlx-lm has no VeRA layer", "use plain LoRA with a small `r`."),
    ),
)

_OPENED_BASES = (
    Row(
        "base=quantized by bitsandbytes",
        "bitsandbytes",
        mlx=No(
            "its weights are in bitsandbytes' own format, which MLX cannot read",
            "name the unquantized base and write `training.quantization: 4bit` for MLX's own format.",
        ),
    ),
    Row(
        "base=an encoder",
        "encoder",
        mlx=No(
            "mlx-lm has decoders alone: BERT and its kin, whose tokens see the whole text, are not among its models",
            "take a decoder such as Qwen/Qwen3-Embedding-0.6B.",
        ),
    ),
    Row(
        "base=a model type without proof",
        "model-type",
        mlx=No(
            f"its logits are not proven equal to transformers' (those of {len(proven_types())} types are, which "
            "docs/reference/features.md lists)",
            "take a base of one of these types.",
        ),
    ),
    Row(
        "training.lora.target_modules=Gemma 4 towers",
        "towers",
        mlx=No(
            "mlx-lm opens the text model without its vision and audio towers",
            "use `target_modules: auto`, the text decoder alone.",
        ),
    ),
)

ROWS = (
    *_works("base", "adapter", "output"),
    *_TASKS,
    *_BACKENDS,
    *_DATA,
    *_TRAINING,
    *_ROPE,
    *_RELORA,
    *_LORA,
    *_OPENED_BASES,
)
