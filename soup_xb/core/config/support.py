"""Feature x backend: what a config asks for that a backend refuses, told at once before anything loads."""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from soup_xb.core.config.schema import COMMAND_LINE, KEYS, LoadedConfig, value_of
from soup_xb.core.config.support_rows import BACKENDS, ROWS, Row
from soup_xb.core.errors import ConfigError, Problem
from soup_xb.core.tasks import TASKS
from soup_xb.core.tasks.task import No

SETTING_OF = "a setting of"
_BY_NAME = {row.name: row for row in ROWS}
_OPTION = f"{COMMAND_LINE}: --backend"
# What each backend imports; a wheel may be there without its companions.
_PACKAGES = {"torch": ("torch", "transformers", "peft"), "mlx": ("mlx", "mlx_lm")}


def refusals(loaded: LoadedConfig, backend: str) -> tuple[Problem, ...]:
    """Every feature of the config that `backend` refuses, in the order of the table."""
    return tuple(
        _problem(row, backend, loaded.where(row.key))
        for row in ROWS
        if not row.follows and row.answer(backend) is not None and _asked(loaded, row, backend)
    )


def check_supported(loaded: LoadedConfig, backend: str) -> None:
    """Raise ConfigError with every refusal."""
    problems = refusals(loaded, backend)
    if problems:
        raise ConfigError.of(problems)


def feature_refusal(name: str, backend: str, where: str = "") -> Problem | None:
    """The refusal of one row by its name, for what only the opened base shows.

    >>> feature_refusal("base=quantized by bitsandbytes", "mlx").code
    'mlx-no-bitsandbytes'
    """
    row = _BY_NAME[name]
    return None if row.answer(backend) is None else _problem(row, backend, where)


def choose_backend(
    loaded: LoadedConfig, *, system: str, machine: str, installed: Callable[[str], bool]
) -> tuple[str, str]:
    """The backend of a run and the reason for it.

    `system` and `machine` are what `platform.system()` and `platform.machine()` tell; `installed` says
    whether a package can be imported. `auto` is mlx on Apple silicon where it is installed and takes every
    key of the file, else torch. Raises ConfigError where the backend is not installed.
    """
    asked = loaded.config.backend
    where = loaded.where("backend")
    if asked != "auto":
        _require(asked, installed, where)
        return asked, "the file says so" if loaded.written.get("backend") else "the command line says so"
    reason = _why_not_mlx(system, machine, installed) or _may_be_encoder(loaded)
    refused = () if reason else refusals(loaded, "mlx")
    if refused:
        reason = refused[0].message
    if not reason:
        return "mlx", "Apple silicon, and mlx is installed and takes every key of the file"
    _require("torch", installed, where)
    return "torch", reason


def available_backend(
    asked: str, *, system: str, machine: str, installed: Callable[[str], bool]
) -> tuple[str, str]:
    """The backend for work that no config describes, and the reason; as in `choose_backend` otherwise."""
    if asked != "auto":
        _require_engine(asked)
        _require(asked, installed, _OPTION)
        return asked, "the command line says so"
    engine = _BY_NAME["backend=mlx"].mlx
    reason = _why_not_mlx(system, machine, installed) or (engine.because if engine else "")
    if not reason:
        return "mlx", "Apple silicon, and mlx is installed"
    _require("torch", installed, _OPTION)
    return "torch", reason


@frozen
class Feature:
    """A line of the table for people: yes or no for each backend, and why not."""

    name: str
    torch: str
    mlx: str
    notes: tuple[str, ...]


def features_table() -> tuple[Feature, ...]:
    """Every row in words."""
    return tuple(
        Feature(row.name.replace("=", ": "), _word(row, "torch"), _word(row, "mlx"), _notes(row))
        for row in ROWS
    )


def _asked(loaded: LoadedConfig, row: Row, backend: str) -> bool:
    if row.key == "backend":
        return row.choice == backend
    value = value_of(loaded.config, row.key)
    return bool(value == row.choice) if row.choice else bool(value != KEYS[row.key].default)


def _problem(row: Row, backend: str, where: str) -> Problem:
    no = row.answer(backend)
    assert no is not None
    name = row.name.replace("=", ": ")
    on = "" if row.key == "backend" else f" on the {backend} backend"
    message = f"`{name}` is not available{on}: {no.because}"
    return Problem(f"{backend}-no-{row.feature}", message, where, _way_out(row, backend, no))


def _way_out(row: Row, backend: str, no: No) -> str:
    others = [other for other in BACKENDS if other != backend and row.answer(other) is None and _runs(other)]
    if not others or row.key == "backend":
        return no.instead
    return f"{no.instead.rstrip('.')}, or run with `--backend {others[0]}`."


def _runs(backend: str) -> bool:
    return _BY_NAME[f"backend={backend}"].answer(backend) is None


def _why_not_mlx(system: str, machine: str, installed: Callable[[str], bool]) -> str:
    if (system, machine) != ("Darwin", "arm64"):
        return "this is not Apple silicon"
    return "" if _missing("mlx", installed) is None else "mlx is not installed"


def _may_be_encoder(loaded: LoadedConfig) -> str:
    """Why `auto` takes torch for vectors of texts: most bases for them are encoders, which mlx refuses."""
    if not TASKS[loaded.config.task].embeds:
        return ""
    return "mlx opens no encoders, and whether the base is one shows when it is opened; `mlx` trains decoders"


def _missing(backend: str, installed: Callable[[str], bool]) -> str | None:
    return next((package for package in _PACKAGES[backend] if not installed(package)), None)


def _require(backend: str, installed: Callable[[str], bool], where: str) -> None:
    missing = _missing(backend, installed)
    if missing is not None:
        message = f"the {backend} backend is not installed (there is no `{missing}`)"
        help = f'pip install "soup-xb[{backend}]"'
        raise ConfigError("backend-not-installed", message, where=where, help=help)


def _require_engine(backend: str) -> None:
    row = _BY_NAME[f"backend={backend}"]
    if row.answer(backend) is not None:
        raise ConfigError.of([_problem(row, backend, _OPTION)])


def _word(row: Row, backend: str) -> str:
    return "yes" if row.answer(backend) is None and _runs(backend) else "no"


def _notes(row: Row) -> tuple[str, ...]:
    if row.follows:
        return (f"{SETTING_OF} `{row.follows.replace('=', ': ')}`",)
    answers = {backend: row.answer(backend) for backend in BACKENDS}
    reasons = {no.because for no in answers.values() if no is not None}
    if len(reasons) == 1 and all(answers.values()):
        return (reasons.pop(),)
    return tuple(f"{backend}: {no.because}" for backend, no in answers.items() if no is not None)
