"""`streaming` of other tools: where a run reads its rows over the network, and where it cannot."""

from __future__ import annotations

from soup_xb.core.config.run_rules import is_local_path
from soup_xb.migrate.account import Account
from soup_xb.migrate.values import boolean, is_on

_ORDER = (
    "the files come in an order of `training.seed`, and the rows that the steps need are kept and shuffled"
)


def read_streaming(account: Account, key: str = "streaming") -> None:
    """Take the key; data and steps have been taken before."""
    if account.peek(key) is not None and not is_on(account.peek(key)):
        account.same(key, "rows are read whole, as without the key")
    reason = _hindrance(account)
    if reason:
        account.leave(key, reason)
    account.carry(key, "data.streaming", boolean, _ORDER)


def _hindrance(account: Account) -> str:
    """Why the data of this file is not streamed, empty where it is."""
    train, held_out = (_listed(account.values.get(key, [])) for key in ("data.train", "data.eval"))
    if "training.max_steps" not in account.values:
        return "streaming needs `training.max_steps`, which says how many rows to read"
    if any(is_local_path(path) for path in train):
        return "local files are read where they are and tokenized into the cache"
    if len(train) != 1:
        return "rows are streamed from one dataset; no key says how many each of several gives"
    if not all(is_local_path(path) for path in held_out):
        return "rows to evaluate on are not streamed, and those on the hub would be downloaded whole"
    return ""


def _listed(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths
