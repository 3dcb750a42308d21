"""What became of the rows of a data file, counted and worded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from soup_xb.core.errors import DataError, Problem
from soup_xb.core.rows.preferences import PairRow
from soup_xb.data.tokenize import EQUAL_ANSWERS
from soup_xb.data.tokenizer import Tokenized

# Places named in a notice; the count says how many more there are.
_NAMED = 3


class _Places:
    """A count with the first few places."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, place: object) -> None:
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(str(place))

    def merge(self, count: int, first: Sequence[str]) -> None:
        self.count += count
        self.first = [*self.first, *first][:_NAMED]

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return ", ".join(self.first) + (f" and {more:,} more" if more else "")


class RowTally:
    """What happened to the rows of a file."""

    def __init__(self, name: str, max_length: int) -> None:
        """Count for the file `name`, whose rows are cut at `max_length`."""
        self.chats = False
        self.truncated = _Places()
        self._name, self._max_length = name, max_length
        self._reasons: Counter[str] = Counter()
        self._unlearnable, self._rewritten, self._hidden = _Places(), _Places(), _Places()
        self._equal, self._other_prompts = _Places(), _Places()

    def state(self) -> dict[str, Any]:
        """The counts as JSON holds them, for `merge`."""
        places = {name: [one.count, one.first] for name, one in self._places().items()}
        return {"chats": self.chats, "reasons": dict(self._reasons), "places": places}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Count what another tally of the same file counted in the rows that follow."""
        self.chats |= state["chats"]
        self._reasons.update(state["reasons"])
        for name, one in self._places().items():
            one.merge(*state["places"][name])

    def _places(self) -> dict[str, _Places]:
        return {name: value for name, value in vars(self).items() if isinstance(value, _Places)}

    def add(self, results: Iterable[Tokenized]) -> None:
        """Count what became of some rows."""
        for result in results:
            if result.row is None:
                self._reasons[result.reason] += 1
                if result.reason == EQUAL_ANSWERS:
                    self._equal.add(result.source)
                else:
                    self._unlearnable.add(f"{result.source} ({result.reason})")
            elif isinstance(result.row, PairRow) and not result.row.shares_prompt:
                self._other_prompts.add(result.source)
            for happened, places in (
                (result.truncated and result.row is not None, self.truncated),
                (result.rewritten and result.row is not None, self._rewritten),
                (result.hidden, self._hidden),
            ):
                if happened:
                    places.add(result.source)

    def nothing_to_learn(self, count: int) -> DataError:
        """The error of a file of `count` rows without one to train on."""
        reasons = "; ".join(f"{reason} ({rows:,})" for reason, rows in self._reasons.most_common())
        return DataError(
            "nothing-to-learn",
            f"there is nothing to learn in any of the {count:,} rows: {reasons}",
            where=self._name,
            help="an assistant turn, a completion, a text, two different answers or two texts that belong together "
            "is what a model learns from; "
            "`soupx data FILE --base BASE` shows the trained tokens.",
        )

    def notices(self) -> Iterator[Problem]:
        """What should be known, worst first; a count of zero says nothing."""
        told = (
            ("rows-without-targets", "left out, with nothing to learn", self._unlearnable),
            ("truncated", f"cut at {self._max_length:,} tokens (`data.max_length`)", self.truncated),
            (
                "rewritten-turns",
                "with an assistant turn that the chat template changes, which is not trained on",
                self._rewritten,
            ),
            ("hidden-turns", "with a turn that the chat template changes or leaves out", self._hidden),
            (
                "prompts-differ",
                "whose prompt is not the same tokens before both answers",
                self._other_prompts,
            ),
        )
        return self._told(told)

    def warnings(self) -> Iterator[Problem]:
        """What may be a mistake in the file."""
        return self._told(
            (("equal-answers", "left out, whose `chosen` and `rejected` are the same tokens", self._equal),)
        )

    def _told(self, told: Iterable[tuple[str, str, _Places]]) -> Iterator[Problem]:
        for code, what, places in told:
            if places.count:
                rows = "1 row" if places.count == 1 else f"{places.count:,} rows"
                yield Problem(code, f"{rows} {what}: {places}", where=self._name)
