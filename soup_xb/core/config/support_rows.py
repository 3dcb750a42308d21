"""What works on which backend: one row for each config key and for each choice of a key.

A row's name is the dotted key, or `key=choice`. A row whose choice is in words (`base=quantized by
bitsandbytes`) is about what only the opened base shows; the backend asks for it by name.
"""

from __future__ import annotations

from attrs import frozen

BACKENDS = ("torch", "mlx")


@frozen
class No:
    """Why a backend refuses a feature, and what to do instead."""

    because: str
    instead: str


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


_CHOSEN_ANSWERS = "train on the preferred answers alone: chat rows with `task: sft`."
_WORKED_ANSWERS = "train on worked answers: chat rows with `task: sft`."
_TEXT_ROWS = "`task: sft` on text rows is what this version trains."

_NO_PREFERENCES = No("the mlx engine has no preference losses", _CHOSEN_ANSWERS)
_NO_HEAD = No(
    "the mlx engine has no scalar head, and MLX's own tools would not load one",
    "use `--backend torch`, or `task: sft` on the preferred answers.",
)
_NO_ROLLOUTS = No(
    "the mlx engine samples no answers while it trains",
    f"use `--backend torch`, or {_WORKED_ANSWERS}",
)

_NO_EMBEDDINGS = No(
    "the mlx engine opens no encoders and has no loss over texts that are compared with each other",
    "train it with `backend: torch`; sentence-transformers then loads the result on a Mac's GPU too.",
)


def _of_embeddings(*names: str) -> tuple[Row, ...]:
    return tuple(Row(name, "embedding", mlx=_NO_EMBEDDINGS, follows="task=embedding") for name in names)


_WORDS_ALONE = "train on the words alone: `task: sft` on text rows."
_NO_PICTURES = No("mlx-lm opens the text part of a base, without the tower that sees", _WORDS_ALONE)
_NO_SOUNDS = No("mlx-lm opens neither speech-to-text models nor the towers that hear", _WORDS_ALONE)

_TASKS = (
    *_works("task", "task=sft", "task=pretrain"),
    *(
        Row(f"task={name}", name, mlx=_NO_PREFERENCES)
        for name in ("dpo", "ipo", "kto", "orpo", "simpo", "bco")
    ),
    Row("task=reward", "reward", mlx=_NO_HEAD),
    *(Row(f"task={name}", name, mlx=_NO_ROLLOUTS) for name in ("grpo", "rlhf")),
    Row("task=embedding", "embedding", mlx=_NO_EMBEDDINGS),
    Row("task=vision", "vision", mlx=_NO_PICTURES),
    Row("task=audio", "audio", mlx=_NO_SOUNDS),
)

_RELORA_NO_MLX = No(
    "a restart edits factors and optimizer state in the middle of a run, which the mlx engine does not do",
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
    *_choices("data.format", "auto", "alpaca", "sharegpt", "messages", "prompt-completion", "text"),
    *(
        Row(f"data.format={name}", "preference", mlx=_NO_PREFERENCES)
        for name in ("preference", "unpaired-preference")
    ),
    *_of_embeddings("data.format=anchor-positive", "data.query_prompt", "data.document_prompt"),
    Row("data.format=transcript", "audio", mlx=_NO_SOUNDS, follows="task=audio"),
    Row("data.format=prompt", "grpo", mlx=_NO_ROLLOUTS, follows="task=grpo"),
    *_works("data.packing", "data.chat_template", "data.streaming"),
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
    *(
        Row(f"training.{name}", "preference", mlx=_NO_PREFERENCES)
        for name in ("beta", "label_smoothing", "simpo_gamma", "desirable_weight", "undesirable_weight")
    ),
    *_of_embeddings(
        "training.pooling",
        *(f"training.pooling={name}" for name in ("auto", "mean", "cls", "last")),
        "training.embedding_scale",
    ),
    Row(
        "training.router_aux_loss_coef",
        "router-loss",
        mlx=No(
            "the mlx engine opens no mixture of experts whose router could be balanced",
            "remove the key, or run with --backend torch.",
        ),
    ),
    *(
        Row(f"training.{name}", "grpo", mlx=_NO_ROLLOUTS, follows="task=grpo")
        for name in (
            "rewards",
            "reward_model",
            "answer_pattern",
            "group_size",
            "max_new_tokens",
            "temperature",
            "scale_rewards",
        )
    ),
    *_works(
        "training.eval_steps", "training.save_steps", "training.save_total_limit", "training.logging_steps"
    ),
)

_LORA = (
    *_works("training.lora", "training.lora.r", "training.lora.alpha", "training.lora.dropout"),
    *_choices("training.lora.target_modules", "auto", "all-linear"),
    Row(
        "training.lora.target_modules=auto+experts",
        "experts",
        mlx=No(
            "3-D expert weights are adapted by a wrapper of PEFT's that mlx-lm does not have",
            "use `target_modules: auto`, which leaves the experts out.",
        ),
    ),
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
        "base=a model type without proof",
        "model-type",
        mlx=No(
            "its logits are not proven equal to transformers' (proven: Llama, Mistral, Qwen 2 and 3, Phi-3, Gemma 2 "
            "and 3 text, SmolLM3, OLMo 2, Granite)",
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
