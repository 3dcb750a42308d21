"""Whose config a file is, told by its keys."""

from __future__ import annotations

from soup_xb.core.config.yaml import Node
from soup_xb.core.errors import ConfigError

AXOLOTL, LLAMA_FACTORY, SOUP = "axolotl", "llama-factory", "soup"
# Keys that one of the tools has and the others do not.
_SIGNS = {
    AXOLOTL: {
        *("base_model", "datasets", "pretraining_dataset", "sequence_len", "micro_batch_size", "num_epochs"),
        *("val_set_size", "lora_target_linear", "lora_target_modules", "load_in_4bit", "load_in_8bit"),
        *("sample_packing", "adapter", "rl"),
    },
    LLAMA_FACTORY: {
        *("model_name_or_path", "stage", "finetuning_type", "template", "dataset", "dataset_dir"),
        *("cutoff_len", "lora_rank", "lora_target", "quantization_bit", "do_train", "val_size"),
        *("per_device_train_batch_size", "num_train_epochs"),
    },
    SOUP: {"base", "task", "data", "training", "output", "modality", "experiment_name"},
}


def detect(root: Node, source: str) -> str:
    """The tool whose keys the file has. Raises ConfigError where they are nobody's, or two tools' alike."""
    counts = {tool: len(signs & root.value.keys()) for tool, signs in _SIGNS.items()}
    best = max(counts.values())
    found = [tool for tool, count in counts.items() if count == best]
    if best == 0 or len(found) > 1:
        told = (
            "has the keys of no tool that is known here" if best == 0 else f"could be of {' or '.join(found)}"
        )
        raise ConfigError(
            "migrate-unknown",
            told,
            where=source,
            help=f"say whose it is: `--from {'`, `--from '.join(_SIGNS)}`.",
        )
    return found[0]
