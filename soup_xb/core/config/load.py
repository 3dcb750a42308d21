"""YAML text <-> Config: load, check everything at once, lay `--set` over it, write the resolved copy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from attrs import evolve

from soup_xb.core.config.checks import contradictions, warnings
from soup_xb.core.config.dependences import counts
from soup_xb.core.config.loaded import LoadedConfig, place
from soup_xb.core.config.schema import KEYS, Config, value_of
from soup_xb.core.config.support import refusals
from soup_xb.core.config.support_rows import BACKENDS
from soup_xb.core.config.yaml import Node, read_yaml
from soup_xb.core.errors import ConfigError, Problem
from soup_xb.core.keys.config_reader import Fault, read_config
from soup_xb.core.keys.config_values import safe_text, shown
from soup_xb.core.keys.overrides import lay_over, read_overrides
from soup_xb.core.keys.unknown_keys import suggestion
from soup_xb.core.yaml.yaml_file import LEAST, read_text
from soup_xb.core.yaml.yaml_text import write_yaml

DEFAULT_PATH = Path("soup.yaml")
# A file with more unknown or doubled keys than this is no config; the rest is counted, not listed.
_MOST_LISTED = 20

__all__ = ["LoadedConfig", "config_dict", "dump_config", "load_config", "parse_config"]


def load_config(path: Path = DEFAULT_PATH, overrides: Sequence[str] = ()) -> LoadedConfig:
    """The checked config of a file, with `--set` texts laid over it.

    Raises ConfigError with every problem of the file, ResourceError where it may not be read.
    """
    return parse_config(read_text(path), str(path), overrides)


def parse_config(text: str, source: str, overrides: Sequence[str] = ()) -> LoadedConfig:
    """The checked config of a YAML text; `source` names it in errors.

    Raises ConfigError with every problem of the text and of the overrides; where there is one, what the backend
    refuses is among them.
    """
    root, duplicates = read_yaml(text, source)
    problems = duplicates[:_MOST_LISTED]
    if len(duplicates) > _MOST_LISTED:
        more = len(duplicates) - _MOST_LISTED
        problems.append(Problem("duplicate-key", f"{more} more keys are given twice", source))
    if root is None or root.value is None:
        raise ConfigError("config-empty", "the file is empty", where=source, help=LEAST)
    if not isinstance(root.value, dict):
        message = f"a config must be a mapping of keys, got {shown(root.plain())}"
        raise ConfigError("not-a-mapping", message, where=f"{source}:{root.line}", help=LEAST)
    laid, override_problems = read_overrides(overrides)
    root = lay_over(root, laid)
    places = list(_lines(root, ""))
    reading = read_config(root.plain())
    faulty = set(_with_keys_below(fault.key for fault in reading.faults))
    written = {key: line for key, line, has_value in places if has_value and key not in faulty}
    loaded = LoadedConfig(reading.config, source, MappingProxyType(written))
    lines = {key: line for key, line, _ in places}
    problems += [*_fault_problems(reading.faults, source, lines), *contradictions(loaded, faulty)]
    problems += override_problems
    if problems:
        told = {problem.where for problem in problems}
        refused = [problem for problem in _refused(loaded) if problem.where not in told]
        raise ConfigError.of(_by_line([*problems, *refused], source))
    return _with_one_strategy(evolve(loaded, warnings=tuple(warnings(loaded))))


def config_dict(config: Config) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, for JSON or YAML; every default is in it.

    Left out is only what means nothing beside the other values (`adam_beta1` under `optimizer: sgd`), so that
    the result loads again to an equal config.
    """
    result: dict[str, Any] = {}
    for key, declaration in KEYS.items():
        *path, name = key.split(".")
        section = result
        for part in path:
            section = section[part]
        value = {} if declaration.section is not None else value_of(config, key)
        if value == declaration.default and not counts(config, key):
            continue
        section[name] = _plain(value)
    return result


def dump_config(config: Config) -> str:
    """The resolved config as YAML text; it loads again to an equal Config."""
    return write_yaml(config_dict(config))


def _lines(node: Node, prefix: str) -> Iterator[tuple[str, int, bool]]:
    """Each dotted key of the tree, its line, and whether it has a value (a null is the default)."""
    for name, entry in node.value.items():
        yield prefix + name, node.lines[name], entry.value is not None
        if isinstance(entry.value, dict):
            yield from _lines(entry, f"{prefix}{name}.")


def _with_keys_below(keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        yield key
        yield from (below for below in KEYS if below.startswith(f"{key}."))


def _fault_problems(faults: Sequence[Fault], source: str, lines: Mapping[str, int]) -> Iterator[Problem]:
    unknown = [fault for fault in faults if fault.refusal.code == "unknown-key"]
    unknown.sort(key=lambda fault: lines.get(fault.key, 0))
    for fault in unknown[:_MOST_LISTED]:
        where = place(source, lines, fault.key).removesuffix(fault.name) + safe_text(fault.name)
        yield Problem("unknown-key", "no such key", where, suggestion(fault.name, fault.section))
    if len(unknown) > _MOST_LISTED:
        yield Problem("unknown-key", f"{len(unknown) - _MOST_LISTED} more keys are unknown", source)
    for fault in faults:
        if fault.refusal.code != "unknown-key":
            where = place(source, lines, fault.key)
            yield Problem(fault.refusal.code, fault.refusal.message, where, fault.refusal.help)


def _refused(loaded: LoadedConfig) -> Iterator[Problem]:
    """What the backend will refuse besides, so that all is told in one round; under `auto`, what every backend does."""
    asked = loaded.config.backend
    by_backend = {name: refusals(loaded, name) for name in (BACKENDS if asked == "auto" else (asked,))}
    places = [{problem.where for problem in found} for found in by_backend.values()]
    for problem in next(iter(by_backend.values())):
        if all(problem.where in others for others in places):
            yield problem


def _by_line(problems: Sequence[Problem], source: str) -> list[Problem]:
    """In the order of the file, what has no line first."""

    def line(problem: Problem) -> int:
        found = re.match(r":(\d+)", problem.where.removeprefix(source))
        return int(found[1]) if found else 0

    return sorted(problems, key=line)


def _with_one_strategy(loaded: LoadedConfig) -> LoadedConfig:
    """`use_olora: true` as `init_strategy: olora` on the same line, so that one key tells the start."""
    lora = loaded.config.training.lora
    if not lora.use_olora:
        return loaded
    lora = evolve(lora, use_olora=False, init_strategy="olora")
    config = evolve(loaded.config, training=evolve(loaded.config.training, lora=lora))
    line = loaded.written["training.lora.use_olora"]
    written = {"training.lora.init_strategy": line, **loaded.written}
    return evolve(loaded, config=config, written=MappingProxyType(written))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
