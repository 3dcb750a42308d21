"""Rewards out of a person's own Python file: the one place where code that a config names is run."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from attrs import frozen

from soup_xb.core.adapter.peft_file import WEIGHTS, adapter_folder
from soup_xb.core.config.run_rules import file_function
from soup_xb.core.config.schema import Config
from soup_xb.core.disk import local_path
from soup_xb.core.errors import ConfigError
from soup_xb.core.objectives.rewards import Answer
from soup_xb.core.rows.prompts import PromptRow
from soup_xb.core.text import did_you_mean

_CALL = "a reward is called as `function(completion, row)` and returns a number."


class _Source(SourceFileLoader):
    """Reads the file as it is, and leaves no compiled copy beside it."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


@frozen(eq=False)
class FileReward:
    """`function(completion, row)`, called for one answer after the other."""

    name: str
    path: Path
    function: Callable[[str, dict[str, Any]], Any]

    def check(self, rows: Sequence[PromptRow]) -> None:
        """The function alone knows what it needs of a row."""

    def earned(self, answers: Sequence[Answer]) -> list[float]:
        """What the function returns. Raises ConfigError for what goes wrong in it, with file and line."""
        return [self._number(answer) for answer in answers]

    def _number(self, answer: Answer) -> float:
        row = answer.row
        value = _run(
            self.path,
            f"`{self.name}` fails on the row {row.source}",
            lambda: self.function(answer.text, dict(row.columns)),
        )
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(
                "reward-not-a-number",
                f"`{self.name}` returns {str(value)[:60]} for the row {row.source}",
                where=str(self.path),
                help=_CALL,
            )
        return number


def load_reward(reward: str) -> FileReward:
    """The function that `./rewards.py:function` names. Running the file is what the config asks for.

    Raises ConfigError for a file that is not there, does not run, or has no such function.
    """
    path_text, name = file_function(reward) or ("", "")
    path = local_path(path_text)
    if not path.is_file():
        raise ConfigError(
            "reward-file",
            "no such file",
            where=str(path),
            help="`training.rewards` names it; check the path.",
        )
    module = _module(path)
    function = getattr(module, name, None)
    if not callable(function):
        names = tuple(key for key, value in vars(module).items() if callable(value))
        raise ConfigError(
            "reward-file",
            f"has no function `{name}`",
            where=str(path),
            help=did_you_mean(name, names) or _CALL,
        )
    return FileReward(name, path, function)


def reward_marks(config: Config) -> list[tuple[str, str]]:
    """What the rewards' files hold, as settings: a resumed run must earn what it would have earned."""
    files = [found[0] for reward in config.training.rewards if (found := file_function(reward))]
    paths = {f"training.rewards {file}": local_path(file) for file in files}
    if config.training.reward_model is not None:
        folder = adapter_folder(local_path(config.training.reward_model))
        paths["training.reward_model weights"] = folder / WEIGHTS
    return [
        (name, hashlib.sha256(path.read_bytes()).hexdigest())
        for name, path in paths.items()
        if path.is_file()
    ]


def _module(path: Path) -> ModuleType:
    name = f"soupx_rewards_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader
    # Data classes and the like look their module up.
    sys.modules[name] = module
    _run(path, "the file does not run", lambda: loader.exec_module(module))
    return module


def _run(path: Path, what: str, call: Callable[[], Any]) -> Any:
    """The person's own code, whatever it raises: one message with the line in their file."""
    try:
        return call()
    except MemoryError:
        raise
    except SyntaxError as error:
        raise _failed(f"{path}:{error.lineno or 1}", what, error.msg, error) from error
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f"{path}:{frames[-1].lineno}" if frames else str(path)
        raise _failed(place, what, str(error), error) from error


def _failed(place: str, what: str, text: str, error: BaseException) -> ConfigError:
    lines = text.strip().splitlines()
    detail = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return ConfigError("reward-failed", f"{what}: {detail}", where=place, help=_CALL)
