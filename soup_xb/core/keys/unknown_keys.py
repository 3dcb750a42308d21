"""Which key was meant: near spellings, keys of other sections, and the names that other tools use."""

from __future__ import annotations

from soup_xb.core.config.schema import KEYS
from soup_xb.core.text import close_names

# What transformers, PEFT, mlx-lm, Axolotl and LLaMA-Factory call our keys.
FOREIGN_NAMES = {
    "adapter_path": "adapter",
    "alpha": "training.lora.alpha",
    "base_model": "base",
    "bf16": "training.precision",
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
