"""axolotl's `datasets`: a list of sources, each with its path, its prompt style and more."""

from __future__ import annotations

import re
from typing import Any

from soup_xb.core.config.checks import PREFERENCES
from soup_xb.core.config.run_rules import is_local_path
from soup_xb.migrate.account import Account, NotCarriedError
from soup_xb.migrate.values import always, is_on, share, whole

_BUILDERS = ("json", "csv", "parquet", "text")
_TYPES = {"alpaca": "alpaca", "completion": "text", "sharegpt": "sharegpt"}
_ALPACA = "axolotl puts Alpaca's preamble around the row; here the base's chat template is used"
_REWRITE = "such prompts are not built here; rewrite the rows as messages or as prompt and completion"
_REWRITE_PAIRS = (
    "such prompts are not built here; rewrite the rows with `prompt`, `chosen`, `rejected`, for kto `completion` "
    "and `label`"
)
_MIXED = "the files are written in different ways; each is told apart by its columns"
_ANSWERS = "assistant turns alone are trained on, with their end token"
_SAME_TURNS = ({"role": "role", "content": "content"}, {"role": "from", "content": "value"})


def read_data(account: Account) -> None:
    """Take the keys about rows."""
    account.carry("sequence_len", "data.max_length", whole, "a longer row is cut here; axolotl drops it")
    account.add("data.max_length", 512, "axolotl's default")
    pretraining = any(account.peek(key) for key in account.matching(r"pretraining_dataset.*"))
    account.collect("pretraining_dataset", "data.train", _paths)
    _datasets(account, "pretraining_dataset", "data.train")
    _datasets(account, "datasets", "data.train")
    _datasets(account, "test_datasets", "data.eval")
    if pretraining:
        account.add("task", "pretrain", "what `pretraining_dataset` means")
    if "data.eval" in account.values:
        account.leave("val_set_size", "`test_datasets` are the held-out rows")
    if account.peek("val_set_size") == 0:
        account.same("val_set_size", "no rows are held out")
    account.carry("val_set_size", "data.val_split", share)
    account.carry("sample_packing", "data.packing", is_on)
    account.carry("chat_template_jinja", "data.chat_template")
    if account.peek("chat_template") == "jinja":
        account.same("chat_template", "`data.chat_template` is Jinja text or a file")
    if str(account.peek("chat_template")).startswith("tokenizer_default"):
        account.same("chat_template", "the base's own template is used")
    account.leave(
        "chat_template", "the base's own template is used; `data.chat_template` takes Jinja text or a file"
    )
    if is_on(account.peek("train_on_inputs")):
        account.leave(
            "train_on_inputs", "answers alone are trained on; rows with `text` train on every token"
        )
    account.same("train_on_inputs", "answers alone are trained on")


def _datasets(account: Account, name: str, to: str) -> None:
    sources: dict[str, list[str]] = {}
    for key in account.matching(rf"{name}\[\d+\]\..*"):
        sources.setdefault(key[: key.index("].") + 2], []).append(key)
    for prefix, keys in sources.items():
        _dataset(account, prefix, to, keys)


def _dataset(account: Account, prefix: str, to: str, keys: list[str]) -> None:
    path, files = account.peek(f"{prefix}path"), account.peek(f"{prefix}data_files")
    if isinstance(path, str) and path.lower() in _BUILDERS and files:
        account.same(f"{prefix}path", "the ending of a file says how it is written")
        path = None
        account.collect(f"{prefix}data_files", to, _paths if to == "data.train" else _files)
    else:
        account.collect(f"{prefix}path", to, _paths if to == "data.train" else _files)
    account.leave(
        f"{prefix}data_files", "the files of a hub dataset cannot be chosen; download them and name them"
    )
    account.same(f"{prefix}ds_type", "the ending of a file says how it is written")
    _style(account, prefix)
    hub = isinstance(path, str) and not is_local_path(path) and to == "data.train"
    for key, ours in (("split", "data.split"), ("name", "data.subset")):
        if hub and account.peek(f"{prefix}{key}") != "train":
            account.carry(f"{prefix}{key}", ours)
        account.same(f"{prefix}{key}", "the split `train` is read, or the whole file")
    _turns(account, prefix, keys)
    for key in keys:
        prompt = re.match(r"(field|type|roles|drop|shards|preprocess)", key.removeprefix(prefix))
        account.leave(key, _rewrite(account) if prompt else "nothing here reads such a setting of a dataset")


def _rewrite(account: Account) -> str:
    return _REWRITE_PAIRS if account.values.get("task") in PREFERENCES else _REWRITE


def _paths(value: Any) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(path, str) for path in found):
        raise NotCarriedError("is no path and no list of paths")
    if any("://" in path for path in found):
        raise NotCarriedError("rows on a remote disk are not read; download them and name the file")
    return found


def _files(value: Any) -> list[str]:
    found = _paths(value)
    if not all(is_local_path(path) for path in found):
        raise NotCarriedError(
            "held-out rows are read from files; download them and name the file in `data.eval`"
        )
    return found


def _style(account: Account, prefix: str) -> None:
    """`type`: how a row becomes a prompt; ours says how it is written."""
    key, style = f"{prefix}type", account.peek(f"{prefix}type")
    if not isinstance(style, str):
        return
    family = style.partition(":")[0]
    found = _TYPES.get(family)
    if family == "chat_template":
        column = str(account.peek(f"{prefix}field_messages") or "messages")
        found = {"messages": "messages", "conversations": "sharegpt"}.get(column)
    if family == "pretrain":
        account.same(key, "`task: pretrain` says it")
    if found is None or (found == "text" and account.peek(f"{prefix}field") not in (None, "text")):
        account.leave(key, _rewrite(account))
        return
    if account.values.get("data.format", found) != found:
        account.withdraw("data.format", _MIXED)
        account.add("data.format", "auto", _MIXED)
        account.leave(key, f"{_MIXED}; {_ALPACA}" if found == "alpaca" else _MIXED)
        return
    account.carry(key, "data.format", always(found), _ALPACA if found == "alpaca" else "")


def _turns(account: Account, prefix: str, keys: list[str]) -> None:
    """How the turns of a conversation are spelled, and which are trained on."""
    if account.peek(f"{prefix}field_messages") in ("messages", "conversations"):
        account.same(f"{prefix}field_messages", "the format says it")
    renamed = [key for key in keys if key.startswith(f"{prefix}message_property_mappings.")]
    mapping = {key.rpartition(".")[2]: account.peek(key) for key in renamed}
    spelled = ("message_field_role", "message_field_content")
    pair = {"role": account.peek(f"{prefix}{spelled[0]}"), "content": account.peek(f"{prefix}{spelled[1]}")}
    for group, meaning in ((renamed, mapping), ([f"{prefix}{name}" for name in spelled], pair)):
        for key in group:
            if meaning in _SAME_TURNS:
                account.same(key, "turns may be spelled role and content, or from and value")
            account.leave(
                key, "turns are spelled role and content, or from and value; rename them in the rows"
            )
    roles = account.peek(f"{prefix}roles_to_train")
    if isinstance(roles, list) and {str(role) for role in roles} <= {"assistant", "gpt"}:
        account.same(f"{prefix}roles_to_train", _ANSWERS)
    if account.peek(f"{prefix}train_on_eos") == "turn":
        account.same(f"{prefix}train_on_eos", _ANSWERS)
    for key in ("roles_to_train", "train_on_eos"):
        account.leave(f"{prefix}{key}", _ANSWERS)
    if str(account.peek(f"{prefix}chat_template")).startswith("tokenizer_default"):
        account.same(f"{prefix}chat_template", "the base's own template is used")
    for key in ("chat_template", "chat_template_jinja"):
        account.leave(
            f"{prefix}{key}", "one template serves all files: `data.chat_template`, Jinja text or a file"
        )
