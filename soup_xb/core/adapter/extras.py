"""What a saved adapter holds besides its factors: a reward head, a kind of media, sentence-transformers' files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import asdict, frozen

from soup_xb.core.adapter.peft_file import HEAD, HEAD_KEY, SETTINGS, WEIGHTS, read_adapter
from soup_xb.core.adapter.tensors import read_tensors, write_tensors
from soup_xb.core.base.folder import read_object
from soup_xb.core.config.schema import POOLINGS
from soup_xb.core.disk import foreign_errors, write_text
from soup_xb.core.errors import ModelError
from soup_xb.core.random_numbers import uniform
from soup_xb.core.tasks import TASKS

# The deviation that most bases' new layers start with (`initializer_range`).
_DEVIATION = 0.02

Array = np.ndarray[Any, Any]


def head_start(width: int, seed: int) -> Array:
    """The head before the first step, float32 (1, width): uniform, mean 0, standard deviation 0.02."""
    values = uniform(width, HEAD, seed)
    start: Array = ((2.0 * values - 1.0) * _DEVIATION * np.sqrt(3.0)).astype(np.float32).reshape(1, width)
    return start


def write_head(folder: Path, head: Array) -> None:
    """Put the head into an adapter that was just written, which becomes one for sequence classification."""
    tensors, metadata = read_tensors(folder / WEIGHTS)
    write_tensors(folder / WEIGHTS, {**tensors, HEAD_KEY: head}, metadata)
    file = folder / SETTINGS
    settings = json.loads(file.read_text("utf-8")) | {"task_type": "SEQ_CLS", "modules_to_save": [HEAD]}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def check_head(folder: Path, head: Array) -> None:
    """Raise ModelError where the head read back from the disk is not the trained one, or tells nothing apart."""
    saved = read_adapter(folder)
    if saved.head is None or not np.array_equal(saved.head, head) or not told_as_reward(saved.settings):
        raise ModelError(
            "adapter-not-saved",
            "the head read back from the disk is not the one that was trained",
            where=str(folder),
            help="check the disk; the last checkpoint can be resumed.",
        )
    if not head.any():
        raise ModelError(
            "adapter-inert",
            "the head is zero: every answer gets the same score",
            where=str(folder),
            help="look at `training.lr` and `training.weight_decay`.",
        )


def told_as_reward(settings: Mapping[str, Any]) -> bool:
    """Whether an adapter's settings say that it scores and does not write."""
    return settings.get("task_type") == "SEQ_CLS" and settings.get("modules_to_save") == [HEAD]


def is_reward_model(folder: Path) -> ModelError:
    """The error for an adapter that scores, where one that writes is asked for."""
    return ModelError(
        "adapter-is-reward-model",
        "is a reward model: it scores answers, and writes none",
        where=str(folder),
        help="name it as `training.reward_model` of a `task: rlhf` file; its README shows how to ask for scores.",
    )


MEDIA_FILE = "media.json"


def write_media_kind(folder: Path, kind: str) -> None:
    """Note beside an adapter that its rows had files of this kind, image or audio."""
    write_text(folder / MEDIA_FILE, json.dumps({"kind": kind}) + "\n")


def read_media_task(folder: Path) -> str:
    """The task that the note stands for, empty where there is none. Raises ModelError for what was never written."""
    file = folder / MEDIA_FILE
    if not file.is_file():
        return ""
    kind = read_object(file, "damaged-adapter").get("kind")
    task = next((task.name for task in TASKS.values() if task.media and task.media == kind), "")
    if not task:
        raise ModelError(
            "damaged-adapter",
            f"`kind` must be one of {', '.join(task.media for task in TASKS.values() if task.media)}",
            where=str(file),
            help="write the adapter again.",
        )
    return task


MODULE_FOLDERS = ("1_Pooling", "2_Normalize")
MODULES, POOLING = "modules.json", "1_Pooling/config.json"
# What sentence-transformers has no place for: the loss's scale, beside what its own files say.
EMBEDDING_FILE = "embedding.json"
LARGEST_FILE = 2**20
# The oldest names of the modules: every version of the library knows them.
_KIND = "sentence_transformers.models"
_MODES = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}
_NEW_MODES = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_MODEL = (
    "an embedding model that is trained here has a transformer, mean, cls or last-token pooling, and no more."
)


@frozen(kw_only=True)
class EmbeddingFacts:
    """How texts become vectors: with the loss's `scale`, and `max_length` in tokens."""

    pooling: str
    scale: float
    max_length: int
    query_prompt: str = ""
    document_prompt: str = ""


def write_embedding_files(folder: Path, facts: EmbeddingFacts, width: int) -> None:
    """Write what `SentenceTransformer(folder)` reads beside an adapter or a model of `width` hidden entries.

    The vectors are normalized, since cosines are what the loss compares.
    """
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    _write(
        folder / MODULES,
        [
            {"idx": index, "name": str(index), "path": path, "type": f"{_KIND}.{kind}"}
            for index, (path, kind) in enumerate(kinds)
        ],
    )
    (folder / "1_Pooling").mkdir()
    modes = {name: mode == facts.pooling for mode, name in _MODES.items()}
    _write(folder / POOLING, {"word_embedding_dimension": width, **modes})
    # The library looks for the folder of each module, and this one has no setting.
    (folder / "2_Normalize").mkdir()
    _write(folder / "2_Normalize" / "config.json", {})
    _write(folder / "sentence_bert_config.json", {"max_seq_length": facts.max_length, "do_lower_case": False})
    prompts = {"query": facts.query_prompt, "document": facts.document_prompt}
    _write(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    _write(folder / EMBEDDING_FILE, asdict(facts))


def read_embedding_facts(folder: Path) -> EmbeddingFacts | None:
    """What `write_embedding_files` wrote, None where there is nothing. Raises ModelError for what it never wrote."""
    file = folder / EMBEDDING_FILE
    if not file.is_file():
        return None
    found = read_object(file, "damaged-adapter")
    try:
        facts = EmbeddingFacts(**found)
    except TypeError as error:
        raise _unlike(file, "has other keys than were written") from error
    texts = (facts.pooling, facts.query_prompt, facts.document_prompt)
    numbers = (facts.scale, facts.max_length)
    if not all(isinstance(text, str) for text in texts) or facts.pooling not in POOLINGS[1:]:
        raise _unlike(file, "has a pooling or prompts that were never written")
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        raise _unlike(file, "has a scale or length that is no number")
    if not 0 < facts.scale < math.inf or not isinstance(facts.max_length, int) or facts.max_length < 1:
        raise _unlike(file, "has a scale or length that is out of range")
    return facts


def pooling_for(asked: str, base: Path, is_encoder: bool = False) -> tuple[str, str]:
    """How a base's hidden states become one vector (mean, cls or last), and why.

    Raises ModelError where the base's own files ask for what is not built here.
    """
    if asked != "auto":
        return asked, "`training.pooling` says so"
    own = base_pooling(base)
    if own:
        return own, "the base's own sentence-transformers files say so"
    if is_encoder:
        return "mean", "the base is an encoder, whose every token sees the whole text"
    return "last", "the base is a decoder, whose last token alone sees the whole text"


def base_pooling(base: Path) -> str:
    """The pooling that a base's own sentence-transformers files ask for, empty where it has none.

    Raises ModelError for a model with further layers, or with a pooling that is not built here.
    """
    if not (base / MODULES).is_file():
        return ""
    kinds = [_kind(module) for module in _read_list(base / MODULES)]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelError(
            "further-layers",
            f"the base is a sentence-transformers model of {', '.join(kinds)[:200]}",
            where=str(base / MODULES),
            help=_MODEL,
        )
    if not (base / POOLING).is_file():
        return ""
    settings = read_object(base / POOLING, "base-config")
    asked = _asked_poolings(settings)
    if len(asked) != 1 or asked[0] not in POOLINGS:
        raise ModelError(
            "unknown-pooling",
            f"the base pools by {', '.join(map(str, asked))[:200] or 'nothing'}",
            where=str(base / POOLING),
            help=f"{_MODEL} Write `training.pooling` to train it with another pooling.",
        )
    return asked[0]


def _asked_poolings(settings: Mapping[str, Any]) -> list[str]:
    """The modes of a pooling module, in our words where there is one; flags are the older way to write them."""
    mode = settings.get("pooling_mode")
    if mode is not None:
        modes = mode if isinstance(mode, list) else [mode]
        return [_NEW_MODES.get(str(one), str(one)) for one in modes]
    known = {name: mode for mode, name in _MODES.items()}
    asked = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on is True]
    return [known.get(name, name) for name in asked]


def _kind(module: Any) -> str:
    return str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else ""


def _read_list(file: Path) -> list[Any]:
    with foreign_errors(lambda reason: _unlike_base(file, f"cannot be read: {reason}")):
        with file.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
        found = json.loads(content)
    if not isinstance(found, list) or len(content) > LARGEST_FILE:
        raise _unlike_base(file, "is not a list of modules")
    return found


def _unlike_base(file: Path, message: str) -> ModelError:
    return ModelError("base-config", message, where=str(file), help="download the file again.")


def _unlike(file: Path, message: str) -> ModelError:
    return ModelError("damaged-adapter", message, where=str(file), help="write the adapter again.")


def _write(file: Path, content: Any) -> None:
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
