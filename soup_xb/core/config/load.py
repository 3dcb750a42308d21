"""YAML text <-> Config: read strictly, lay `--set` over it, check everything at once, write the resolved copy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
from attrs import evolve, frozen
from cattrs import Converter
from cattrs.errors import AttributeValidationNote, ClassValidationError, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn, override

from soup_xb.core.config.checks import contradictions, counts, warnings
from soup_xb.core.config.keys import KeyRefused, key_of, read_value, safe_text, shown
from soup_xb.core.config.schema import COMMAND_LINE, KEYS, Config, LoadedConfig, place, suggestion, value_of
from soup_xb.core.config.support import refusals
from soup_xb.core.config.support_rows import BACKENDS
from soup_xb.core.config.yaml import LEAST, Node, read_text, read_yaml, write_yaml
from soup_xb.core.errors import ConfigError, Problem

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


def recorded_config(tree: Mapping[str, Any], source: str) -> LoadedConfig:
    """The config that a run recorded in `source`; the rules that a person's file is checked by are not asked again.

    Raises ConfigError with every key that is unknown or has a value that it does not take.
    """
    reading = read_config(tree)
    if reading.faults:
        raise ConfigError.of(list(_fault_problems(reading.faults, source, {})))
    return LoadedConfig(reading.config, source, MappingProxyType({}))


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


# Stands in for required text that is missing or wrong, so that the rest of the file can still be checked.
_PLACEHOLDER = "?"


@frozen
class Fault:
    """What is wrong with the key `name` of a `section` (dotted, "" at the top)."""

    section: str
    name: str
    refusal: KeyRefused

    @property
    def key(self) -> str:
        """The dotted name of the key."""
        return f"{self.section}.{self.name}" if self.section else self.name


@frozen
class Reading:
    """A config and the faults on the way. Where `faults` is not empty, those keys hold their defaults."""

    config: Config
    faults: tuple[Fault, ...]


def read_config(tree: Mapping[str, Any]) -> Reading:
    """Read the whole config; every unknown, missing, mistyped or out-of-range key is a Fault."""
    tree = {"data": {}, **tree}
    try:
        return Reading(_read_section(tree, Config), ())
    except ClassValidationError as error:
        faults = tuple(_faults(error, ""))
    sound = _without(tree, {fault.key for fault in faults}, "")
    sound.setdefault("base", _PLACEHOLDER)
    sound.setdefault("data", {}).setdefault("train", _PLACEHOLDER)
    return Reading(_read_section(sound, Config), faults)


@cache
def _section_reader(cls: type) -> Any:
    """The cattrs reader of a config class, each attribute read by its declaration."""
    hooks = {attribute.name: override(struct_hook=_hook(attribute)) for attribute in attrs.fields(cls)}
    return make_dict_structure_fn(cls, Converter(), _cattrs_forbid_extra_keys=True, **hooks)  # type: ignore[arg-type]


def _hook(attribute: attrs.Attribute[Any]) -> Any:
    key = key_of(attribute)
    if key.section is not None:
        return lambda raw, _: _read_section(raw, key.section)
    return lambda raw, _: read_value(key, raw)


def _read_section(raw: Any, cls: Any) -> Any:
    # A section whose keys are all commented out is a null in YAML.
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise KeyRefused(
            "wrong-type", f"must be a mapping of keys, got {shown(raw)}", "write its keys below it, indented."
        )
    return _section_reader(cls)(raw, cls)


def _faults(error: ClassValidationError, section: str) -> Iterator[Fault]:
    for exception in error.exceptions:
        if isinstance(exception, ForbiddenExtraKeysError):
            for unknown in exception.extra_fields:
                yield Fault(section, unknown, KeyRefused("unknown-key", "no such key"))
            continue
        notes = getattr(exception, "__notes__", ())
        name = next(note.name for note in notes if isinstance(note, AttributeValidationNote))
        key = f"{section}.{name}" if section else name
        if isinstance(exception, ClassValidationError):
            yield from _faults(exception, key)
        elif isinstance(exception, KeyRefused):
            yield Fault(section, name, exception)
        elif isinstance(exception, KeyError):
            yield Fault(section, name, KeyRefused("missing-key", "is missing", _how_to_write(key)))
        else:
            raise exception


def _how_to_write(key: str) -> str:
    return f"write `{key.rpartition('.')[2]}:`. {KEYS[key].meaning}"


def _without(tree: Any, faulty: set[str], prefix: str) -> dict[str, Any]:
    kept = {}
    for name, value in (tree or {}).items():
        key = prefix + name
        if key in faulty:
            continue
        section = key in KEYS and KEYS[key].section is not None
        kept[name] = _without(value, faulty, f"{key}.") if section else value
    return kept


_OVERRIDE_FORM = "write it as `--set training.lr=1e-4`; the value `null` is the default."


@frozen
class Override:
    """One `--set`: a dotted key of the config and its value; the value None is the default."""

    key: str
    node: Node


def read_overrides(texts: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """The overrides in their order, and a problem for each that cannot be read."""
    overrides: list[Override] = []
    problems: list[Problem] = []
    for text in texts:
        try:
            overrides.append(_read_override(text))
        except ConfigError as error:
            problems.extend(error.problems)
    return overrides, problems


def lay_over(root: Node, overrides: Sequence[Override]) -> Node:
    """The tree with every override in it; where the file has no section for a key, one is made."""
    for given in overrides:
        root = _with_value(root, given.key.split("."), given.node)
    return root


def _read_override(text: str) -> Override:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or not value.strip():
        raise ConfigError(
            "override", f"`--set {safe_text(text)}` is not key=value", where=COMMAND_LINE, help=_OVERRIDE_FORM
        )
    where = f"{COMMAND_LINE}: {safe_text(key)}"
    if key not in KEYS:
        section, _, name = key.rpartition(".")
        raise ConfigError(
            "unknown-key", "no such key", where=where, help=suggestion(name, section, dotted=True)
        )
    if KEYS[key].section is not None:
        raise ConfigError(
            "override", "is a section", where=where, help=f"set its keys, such as `{key}.{_first(key)}`."
        )
    try:
        node, problems = read_yaml(value, COMMAND_LINE)
    except ConfigError as error:
        problems = list(error.problems)
        node = None
    if problems:
        raise ConfigError.of(evolve(problem, where=where) for problem in problems)
    return Override(key, _without_lines(node) if node else Node(None, 0))


def _first(section: str) -> str:
    return next(key for key in KEYS if key.startswith(f"{section}.")).removeprefix(f"{section}.")


def _without_lines(node: Node) -> Node:
    if isinstance(node.value, dict):
        entries = {key: _without_lines(entry) for key, entry in node.value.items()}
        return Node(entries, 0, dict.fromkeys(entries, 0))
    if isinstance(node.value, list):
        return Node([_without_lines(entry) for entry in node.value], 0)
    return Node(node.value, 0)


def _with_value(node: Node, path: Sequence[str], value: Node) -> Node:
    """A copy of the mapping with `value` at `path`; a null takes the key out, which leaves its default."""
    name, rest = path[0], path[1:]
    values, lines = dict(node.value), dict(node.lines)
    below = values.get(name)
    if rest:
        if below is not None and below.value is not None and not isinstance(below.value, dict):
            # The file says something else than a section here, and that is reported.
            return node
        if below is None or below.value is None:
            below = Node({}, 0)
            lines.setdefault(name, 0)
        values[name] = _with_value(below, rest, value)
    elif value.value is None:
        values.pop(name, None)
        lines.pop(name, None)
    else:
        values[name], lines[name] = value, 0
    return Node(values, node.line, lines)
