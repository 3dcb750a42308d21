"""A migration from beginning to end: whose file it is, each key taken, and what `soupx check` says of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from textwrap import wrap
from types import MappingProxyType
from typing import Any

from attrs import frozen

from soup_xb.core.config.keys import safe_text
from soup_xb.core.config.load import parse_config
from soup_xb.core.config.schema import KEYS
from soup_xb.core.config.support import refusals
from soup_xb.core.config.support_rows import BACKENDS, ROWS, Row
from soup_xb.core.config.yaml import write_yaml
from soup_xb.core.errors import ConfigError, Problem
from soup_xb.migrate import soup
from soup_xb.migrate.account import Account, Added, Carried, Left
from soup_xb.migrate.axolotl import read_axolotl
from soup_xb.migrate.detect import AXOLOTL, LLAMA_FACTORY, SOUP, detect
from soup_xb.migrate.llama_factory import read_llama_factory
from soup_xb.migrate.reasons import REASONS
from soup_xb.migrate.source import entries, read_source

_READERS: Mapping[str, Callable[[Account], None]] = MappingProxyType(
    {AXOLOTL: read_axolotl, LLAMA_FACTORY: read_llama_factory, SOUP: soup.read_soup}
)
TOOLS = tuple(_READERS)
# Without them it would be another run; the check says what is refused.
_KEPT = ("task", "data.format", "backend")


@frozen
class Migration:
    """One file of another tool as ours. Every key of it is in `carried` or in `left`.

    `problems` is what `soupx check` refuses in the result, empty where it passes.
    """

    tool: str
    source: str
    text: str
    carried: tuple[Carried, ...]
    added: tuple[Added, ...]
    left: tuple[Left, ...]
    problems: tuple[Problem, ...]


def migrate(text: str, source: str, tool: str = "auto") -> Migration:
    """The config that another tool's YAML text means here; `source` names it in errors.

    Raises ConfigError for a text that is no YAML mapping, that is no known tool's, and that asks for a task
    which is not among ours.
    """
    root = read_source(text, source)
    tool = detect(root, source) if tool == "auto" else tool
    account = Account(tool, source, entries(root, soup.WHOLE if tool == SOUP else ()))
    _READERS[tool](account)
    account.leave_rest(REASONS)
    _withdraw_unavailable(account)
    written = _text(account, source)
    return Migration(
        tool,
        source,
        written,
        tuple(sorted(account.carried, key=lambda carried: carried.line)),
        tuple(account.added),
        tuple(sorted(account.left, key=lambda left: left.line)),
        _problems(written),
    )


def _withdraw_unavailable(account: Account) -> None:
    """Take back what no backend offers, so that the rest runs; the account names it."""
    for row in ROWS:
        refused = [row.answer(backend) for backend in BACKENDS]
        if row.key in account.values and row.key not in _KEPT and all(refused) and _asked(row, account):
            why = next(no.because for no in refused if no is not None)
            account.withdraw(row.key, f"not available: {why}")


def _asked(row: Row, account: Account) -> bool:
    value = account.values[row.key]
    return bool(value == row.choice) if row.choice else bool(value != KEYS[row.key].default)


def _text(account: Account, source: str) -> str:
    """The config as YAML in the order of our keys, with a head that says where it comes from."""
    nested: dict[str, Any] = {}
    for key in KEYS:
        if key not in account.values:
            continue
        *sections, name = key.split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        value = account.values[key]
        target[name] = value[0] if key in ("data.train", "data.eval") and len(value) == 1 else value
    head = f"From the {account.tool} file {safe_text(source)}, by soupx migrate."
    names = ", ".join(safe_text(left.key) for left in account.left)
    told = [head, *wrap(f"Not carried over: {names}." if names else "", 108)]
    return "".join(f"# {line}\n" for line in told) + write_yaml(nested)


def _problems(text: str) -> tuple[Problem, ...]:
    """What a check of the result says: its own mistakes, else what no backend runs."""
    try:
        loaded = parse_config(text, "soup.yaml")
    except ConfigError as error:
        return error.problems
    if loaded.config.backend != "auto":
        return tuple(refusals(loaded, loaded.config.backend))
    found = [tuple(refusals(loaded, backend)) for backend in BACKENDS]
    return () if not all(found) else found[0]
