"""Every failure that a user can cause, in one shape; the class of the error carries the exit code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, TypeVar

from attrs import field, frozen

from soup_xb.core.text import legible

Error = TypeVar("Error", bound="SoupError")


@frozen
class Problem:
    """One thing that is wrong (or worth a warning), ready to be shown.

    `code` is a word that says what it is, `where` a place such as `soup.yaml:7: training.lr`,
    `help` the way out. Texts quote files, so they are made legible: one line, printable, without access tokens.
    """

    code: str
    message: str = field(converter=legible)
    where: str = field(default="", converter=legible)
    help: str = field(default="", converter=legible)

    def render(self, severity: str = "error") -> str:
        """The problem as text.

        >>> print(Problem("unknown-key", "no such key", "soup.yaml:7: data.trian", "did you mean `train`?").render())
        error[unknown-key] soup.yaml:7: data.trian: no such key
          help: did you mean `train`?
        """
        head = f"{severity}[{self.code}] {self.where}: {self.message}"
        if not self.where:
            head = f"{severity}[{self.code}] {self.message}"
        return f"{head}\n  help: {self.help}" if self.help else head


class SoupError(Exception):
    """A failure that the user can mend. Raise a subclass: it decides the exit code."""

    exit_code: ClassVar[int] = 1

    def __init__(self, code: str, message: str, *, where: str = "", help: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(code, message, where, help),)
        super().__init__(message)

    @classmethod
    def of(cls: type[Error], problems: Iterable[Problem]) -> Error:
        """One error that carries several problems, all of them shown at once."""
        problems = tuple(problems)
        first = problems[0]
        error = cls(first.code, first.message, where=first.where, help=first.help)
        error.problems = problems
        return error

    def __str__(self) -> str:
        return "\n".join(problem.render() for problem in self.problems)


class ConfigError(SoupError):
    """The command line, the config, a template or an unsupported feature."""

    exit_code = 2


class DataError(SoupError):
    """A data file or a row in it."""

    exit_code = 3


class ModelError(SoupError):
    """The base model or an adapter."""

    exit_code = 4


class CheckpointError(SoupError):
    """A checkpoint that is missing, damaged or belongs to another run."""

    exit_code = 5


class NonFiniteError(SoupError):
    """A loss or a gradient that is not finite."""

    exit_code = 6


class ResourceError(SoupError):
    """Disk, memory, permission or lock."""

    exit_code = 7


class StoppedError(SoupError):
    """A signal stopped the run; a checkpoint was written and the run can be resumed."""

    exit_code = 75
