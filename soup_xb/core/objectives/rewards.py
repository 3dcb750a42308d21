"""What sampled answers earn by rules: the protocol of a reward, and the two that are built in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from types import MappingProxyType
from typing import Any, Protocol

from attrs import frozen

from soup_xb.core.errors import ConfigError, DataError
from soup_xb.core.rows.row import Row

# For one text; a pattern that backtracks without end hits it.
_SECONDS = 2.0
_ANSWER = "answer"


@frozen(eq=False)
class Answer:
    """What the model wrote to a row's prompt, as text without special tokens."""

    row: Row
    text: str


class Reward(Protocol):
    """A reward by name. It is a function of the answers alone, so that a resumed run earns the same."""

    @property
    def name(self) -> str:
        """What its mean is told by."""

    def check(self, rows: Sequence[Row]) -> None:
        """Raise DataError, before anything is sampled, for a row that it cannot judge."""

    def earned(self, answers: Sequence[Answer]) -> Sequence[float]:
        """What each answer earns, finite numbers."""


@frozen(eq=False)
class PatternReward:
    """A built-in reward: 1 or 0 for each answer, by what the pattern finds in it."""

    name: str
    pattern: Any
    where: str

    def check(self, rows: Sequence[Row]) -> None:
        """An exact match needs something to match with."""
        missing = next((row for row in rows if self.name == "exact-match" and _expected(row) is None), None)
        if missing is not None:
            raise DataError(
                "missing-answer",
                "has no `answer`, which the reward `exact-match` compares with",
                where=f"{missing.source}: {_ANSWER}",
                help="give every row an `answer` (text or a number), or name another reward.",
            )

    def earned(self, answers: Sequence[Answer]) -> list[float]:
        """1.0 where the answer is as it should be. Raises ConfigError for a pattern that runs away."""
        return [float(_EARNED[self.name](self._found(answer.text), answer.row)) for answer in answers]

    def _found(self, text: str) -> list[str]:
        """The answers in a text: the pattern's first group, or all of it, wherever it matches."""
        try:
            matches = list(self.pattern.finditer(text, timeout=_SECONDS, concurrent=False))
        except TimeoutError as error:
            raise ConfigError(
                "runaway-pattern",
                f"the pattern takes more than {_SECONDS:g} s on one answer",
                where=self.where,
                help="write it without a repetition inside a repetition, such as `(a+)+`.",
            ) from error
        return [match[1 if self.pattern.groups else 0] or "" for match in matches]


def _is_formatted(found: list[str], _row: Row) -> bool:
    return len(found) == 1


def _matches(found: list[str], row: Row) -> bool:
    return bool(found) and same_answer(found[-1], str(_expected(row)))


_EARNED: Mapping[str, Callable[[list[str], Row], bool]] = MappingProxyType(
    {"exact-match": _matches, "format": _is_formatted}
)


def same_answer(given: str, expected: str) -> bool:
    """Whether two answers are the same number, or the same words whatever their case and spacing.

    >>> same_answer(" 1,250.0 ", "1250"), same_answer("New  York", "new york"), same_answer("12", "21")
    (True, True, False)
    """
    numbers = (_number(given), _number(expected))
    if None not in numbers:
        return numbers[0] == numbers[1]
    return given.split() == expected.split() or given.casefold().split() == expected.casefold().split()


def _expected(row: Row) -> Any:
    value = row.extra.columns.get(_ANSWER)
    usable = isinstance(value, str | int | float) and not isinstance(value, bool)
    return value if usable and str(value).strip() else None


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.strip().replace(",", "")) if len(text) < 200 else None
    except InvalidOperation:
        return None
    return number if number is not None and number.is_finite() else None
