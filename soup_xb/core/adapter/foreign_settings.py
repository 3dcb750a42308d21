"""An adapter's settings file as it comes from somebody else: its size, its numbers, and what it asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from soup_xb.core.config.keys import LONGEST_PATTERN
from soup_xb.core.errors import ModelError

LARGEST_FILE = 4 * 2**20
# A pattern for each module of a large model with experts; matching them is bounded in time as well.
MOST_PATTERNS = 4096
LARGEST_NUMBER = 1e6
# Starts of PEFT's that leave the base as it is. After the others the base that the adapter belongs to is another.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Settings of PEFT's LoRA under which the factors are not all that the model is.
_OTHER_MODELS = {
    "layer_replication": "layers of the base are used several times",
    "alora_invocation_tokens": "the adapter acts only after certain tokens of a row (aLoRA)",
    "arrow_config": "a router chooses among several adapters (Arrow)",
    "use_qalora": "the inputs are pooled before A (QALoRA)",
    "use_bdlora": "the factors are block-diagonal (BD-LoRA)",
}
# Tensors that an adapter file may hold beside the factors of linear layers, by their names: what they are called.
_BESIDE = (
    (re.compile(r"\.lora_embedding_[AB]$"), "LoRA factors of an embedding"),
    (re.compile(r"\.token_adapter\."), "trained rows of an embedding (`trainable_token_indices`)"),
    (re.compile(r"\.lora_[AB]\.bias$"), "a bias in the factors (`lora_bias`)"),
    (re.compile(r"\.bias$"), "trained biases of the base (`bias`)"),
    (re.compile(r"\.lora_[AB]\.\w+\.weight$"), "factors under an adapter's name, as no saved file has them"),
    (
        re.compile(r"^(?!.*\.lora_(A|B|magnitude_vector)\.weight$).*\.weight$"),
        "whole weights (`modules_to_save`, or an embedding)",
    ),
)


def read_settings(file: Path) -> dict[str, Any]:
    """The object in a settings file. Raises ModelError for a file that is too large or no JSON object."""
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
    except OSError as error:
        raise damaged(file, f"cannot be read: {error.strerror or error}") from error
    if len(content) > LARGEST_FILE:
        raise damaged(file, f"is larger than {LARGEST_FILE} bytes")
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(file, f"is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ModelError(
            "foreign-adapter", "must be an object, as an adapter's settings are", where=str(file)
        )
    return settings


def check_peft_settings(settings: dict[str, Any], file: Path) -> None:
    """Raise ModelError for settings that are out of range, or that an adapter on the untouched base cannot have."""
    for name in ("rank_pattern", "alpha_pattern"):
        _check_patterns(settings.get(name) or {}, name, file)
    check_number(settings.get("lora_alpha", 8), "`lora_alpha`", file)
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        check_number(alpha, f"`{pattern[:60]}` in `alpha_pattern`", file)
    start = settings.get("init_lora_weights", True)
    if not any(start is plain or (isinstance(start, str) and start == plain) for plain in _PLAIN_STARTS):
        raise ModelError(
            "foreign-adapter",
            f"belongs to a base that `init_lora_weights: {json.dumps(start)[:40]}` changed, not to the untouched one",
            where=str(file),
            help="save it with PEFT's `path_initial_model_for_weight_conversion`, which makes it a plain LoRA.",
        )
    for key, what in _OTHER_MODELS.items():
        if settings.get(key):
            raise ModelError(
                "foreign-adapter",
                f"`{key}`: {what}",
                where=str(file),
                help="use it with PEFT; it cannot be written as a LoRA on the untouched base.",
            )


def check_number(value: Any, what: str, file: Path) -> float:
    """The number itself. Raises ModelError for anything else, and for one that no adapter has."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise damaged(file, f"{what} must be a number, got {json.dumps(value)[:40]}")
    # In this order: an integer beyond every float compares, and cannot be asked whether it is finite.
    if abs(value) > LARGEST_NUMBER:
        raise damaged(file, f"{what} must be at most {LARGEST_NUMBER:g}")
    return value


def check_keys(keys: Iterable[str], file: Path) -> None:
    """Raise ModelError for tensors that are trained and no factors of linear layers: what they are, and a way out."""
    for key in keys:
        what = next((what for pattern, what in _BESIDE if pattern.search(key)), None)
        if what is not None:
            raise ModelError(
                "more-than-factors",
                f"holds more than the factors of linear layers: {what}, first `{key}`",
                where=str(file),
                help="fold it into its base with PEFT (`PeftModel.from_pretrained(model, FOLDER).merge_and_unload()`, "
                "then `save_pretrained`), and use the result as `base`.",
            )


def damaged(file: Path, message: str) -> ModelError:
    """The error for a file of an adapter that is not what was written."""
    return ModelError("damaged-adapter", message, where=str(file), help="write the adapter again.")


def _check_patterns(patterns: Any, name: str, file: Path) -> None:
    if not isinstance(patterns, dict):
        raise damaged(file, f"`{name}` must be an object")
    if len(patterns) > MOST_PATTERNS:
        raise damaged(file, f"`{name}` has {len(patterns)} patterns, at most {MOST_PATTERNS} are read")
    longest = max(map(len, patterns), default=0)
    if longest > LONGEST_PATTERN:
        raise damaged(
            file, f"`{name}` has a pattern of {longest} characters, at most {LONGEST_PATTERN} are read"
        )
