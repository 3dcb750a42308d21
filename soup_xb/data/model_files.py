"""The files of a base that travel with an adapter or a merged model: its tokenizer's, its processor's, its ends.

They are the base's own, byte for byte. What differs is changed in a copy: a chat template that the run was given, a
padding token, the tokens that end a turn, and how transformers 5 spells what transformers 4 reads too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from soup_xb.core.base.folder import read_object
from soup_xb.core.base.model_config import CONFIG
from soup_xb.core.disk import write_text
from soup_xb.core.errors import ModelError
from soup_xb.core.text import mask_file

TOKENIZER = "tokenizer_config.json"
GENERATION = "generation_config.json"
TEMPLATE, _TEMPLATE_OF_PROCESSOR = "chat_template.jinja", "chat_template.json"
# Templates beside the default one.
_TEMPLATES = "additional_chat_templates"
_TOKENIZER_FILES = {
    TOKENIZER, TEMPLATE, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tekken.json",
}  # fmt: skip
_TOKENIZER_SUFFIXES = (".model", ".tiktoken", ".spm")
_SETTINGS = (TOKENIZER, "special_tokens_map.json", "added_tokens.json")
PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", _TEMPLATE_OF_PROCESSOR,
)  # fmt: skip
# Reads tokenizer.json as it stands, by that name in every transformers.
ANY_CLASS = "PreTrainedTokenizerFast"


@frozen(kw_only=True)
class TokenizerChanges:
    """What a tokenizer in use has otherwise than its files; empty for nothing.

    `class_name` is for settings that name no class. `plain_start`: it puts no token before a text.
    """

    template: str = ""
    pad_token: str = ""
    class_name: str = ""
    plain_start: bool = False


def copy_tokenizer(base: Path, folder: Path, changes: TokenizerChanges) -> None:
    """Copy a tokenizer's files with these changes; transformers 4 and 5 read the same tokens from them."""
    for file in _files_of_tokenizer(base):
        if changes.template and file.parent.name == _TEMPLATES:
            continue
        to = folder / file.relative_to(base)
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, to)
    change_tokenizer(folder, changes)
    for name in _SETTINGS:
        if (folder / name).is_file():
            mask_file(folder / name)


def change_tokenizer(folder: Path, changes: TokenizerChanges) -> None:
    """Make the changes to a copied tokenizer, and spell its settings as transformers 4 does."""
    file = folder / TOKENIZER
    found = read_object(file, "broken-tokenizer") if file.is_file() else {}
    settings = older_spelling(found)
    if (
        changes.plain_start
        and "backend" in found
        and settings.get("tokenizer_class") not in (None, ANY_CLASS)
    ):
        # transformers 5 leaves the key out, and Llama's and Gemma's classes of transformers 4 put bos first without it.
        settings.setdefault("add_bos_token", False)
    if changes.class_name and not settings.get("tokenizer_class"):
        settings["tokenizer_class"] = changes.class_name
    if changes.pad_token:
        settings["pad_token"] = changes.pad_token
    if changes.template:
        # transformers prefers the file, llama.cpp's converter and older tools know the key alone.
        write_text(folder / TEMPLATE, changes.template)
        settings["chat_template"] = changes.template
    if settings != found:
        _write(file, settings)


def read_as_it_stands(folder: Path) -> None:
    """Name the class that adds nothing of its own to tokenizer.json."""
    file = folder / TOKENIZER
    settings = read_object(file, "broken-tokenizer") if file.is_file() else {}
    _write(folder / TOKENIZER, {**settings, "tokenizer_class": ANY_CLASS})


def older_spelling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json of transformers 5 in the words of transformers 4, which both read alike.

    >>> older_spelling({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]})["tokenizer_class"]
    'PreTrainedTokenizerFast'
    """
    older = dict(settings)
    if older.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = ANY_CLASS
        # What transformers 5 takes without the key; transformers 4 adds token types, which `generate` refuses.
        older.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(older.get("extra_special_tokens"), list):
        extra = older.pop("extra_special_tokens")
        if extra and not older.get("additional_special_tokens"):
            older["additional_special_tokens"] = extra
    if isinstance(older.get("model_specific_special_tokens"), dict) and "extra_special_tokens" not in older:
        older["extra_special_tokens"] = older.pop("model_specific_special_tokens")
    return older


def copy_processor(base: Path, folder: Path, template: str = "") -> None:
    """Copy a processor's settings, with the chat template in use where it keeps one of its own."""
    for name in PROCESSOR_FILES:
        if not (base / name).is_file():
            continue
        if template and name == _TEMPLATE_OF_PROCESSOR:
            _write(folder / name, {"chat_template": template})
            continue
        shutil.copyfile(base / name, folder / name)
        mask_file(folder / name)


def copy_saved_tokenizer(adapter: Path, folder: Path) -> None:
    """Copy what `copy_tokenizer` and `write_generation` wrote beside an adapter."""
    for file in (*_files_of_tokenizer(adapter), adapter / GENERATION):
        if file.is_file():
            to = folder / file.relative_to(adapter)
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, to)


@frozen
class SavedChat:
    """What the files beside an adapter say of its conversations: the end ids, and whether the template is its own."""

    end_ids: tuple[int, ...]
    new_template: bool

    @property
    def differs(self) -> bool:
        """Whether the base's own tokenizer may not do."""
        return self.new_template or len(self.end_ids) > 1


def read_saved_chat(adapter: Path) -> SavedChat:
    """Read what `copy_tokenizer` and `write_generation` wrote beside an adapter, also where they wrote nothing."""
    ends = base_end_ids(adapter / GENERATION, {}) if (adapter / GENERATION).is_file() else []
    file, template = adapter / TOKENIZER, adapter / TEMPLATE
    told = read_object(file, "broken-tokenizer").get("chat_template") if file.is_file() else None
    # Both places at once are how a new template is written.
    return SavedChat(
        tuple(ends), isinstance(told, str) and template.is_file() and template.read_text("utf-8") == told
    )


def base_end_ids(generation: Path | None, config: Mapping[str, Any]) -> list[int]:
    """The tokens that end a generation by a base's own files: generation_config.json, or else config.json.

    Raises ModelError for what are no token ids.
    """
    if generation is not None:
        return _ids(generation, _settings_of(generation))
    text = config.get("text_config")
    return _ids(Path(CONFIG), {**(text if isinstance(text, dict) else {}), **config})


def write_generation(
    generation: Path | None, config: Mapping[str, Any], folder: Path, end_ids: Sequence[int]
) -> None:
    """Write generation_config.json: the base's own, if it has one, with all of `end_ids` as ends."""
    if generation is not None:
        settings = _settings_of(generation)
        shutil.copyfile(generation, folder / GENERATION)
    else:
        # What transformers takes from the config as long as there is no such file.
        settings = {
            name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None
        }
    if end_ids and _as_list(settings.get("eos_token_id")) != list(end_ids):
        _write(
            folder / GENERATION,
            {**settings, "eos_token_id": list(end_ids) if len(end_ids) > 1 else end_ids[0]},
        )
    if (folder / GENERATION).is_file():
        mask_file(folder / GENERATION)


def _files_of_tokenizer(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        if file.is_file() and (file.name in _TOKENIZER_FILES or file.suffix in _TOKENIZER_SUFFIXES):
            yield file
    if (folder / _TEMPLATES).is_dir():
        yield from sorted((folder / _TEMPLATES).glob("*.jinja"))


def _settings_of(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_bytes())
        settings.get("")
    except (ValueError, AttributeError, RecursionError, OSError) as error:
        raise ModelError("base-config", f"is not a JSON object: {error}", where=str(file)) from error
    found: dict[str, Any] = settings
    return found


def _ids(file: Path, settings: Mapping[str, Any]) -> list[int]:
    ids = _as_list(settings.get("eos_token_id"))
    if any(type(token) is not int and token is not None for token in ids):
        raise ModelError(
            "base-config", "`eos_token_id` must be a number or a list of numbers", where=str(file)
        )
    return [token for token in ids if token is not None]


def _as_list(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [ids]


def _write(file: Path, settings: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
