"""How much of a dataset a run takes, where it does not read the whole."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from attrs import frozen

from soup_xb.core.config.schema import Config
from soup_xb.core.errors import Problem
from soup_xb.core.run.schedule import floor_share
from soup_xb.core.tasks import TASKS

Array = np.ndarray[Any, Any]


@frozen
class Goal:
    """So many of a `unit`: `rows`, `answers` (a pair has two), or `tokens` in sequences of at most `length`."""

    unit: str
    count: int
    length: int = 0

    @property
    def words(self) -> str:
        """The goal as a text; two that are the same say the same."""
        return f"{self.count} {self.unit} of {self.length}" if self.length else f"{self.count} {self.unit}"

    def ended_early(self, held: int, where: str) -> Problem:
        """What to say where a dataset holds less."""
        return Problem(
            "stream-ended",
            f"the whole dataset was read: it holds {held:,} of the {self.count:,} {self.unit} that the steps ask for, "
            "so that they are seen again, epoch by epoch",
            where=where,
        )

    def held(self, counts: Array, lengths: Array) -> int:
        """How much of the unit rows hold, given the sequences of each row and the tokens of each sequence."""
        if self.unit == "rows":
            return len(counts)
        if self.unit == "answers":
            return int(counts.sum())
        # A document that is cut may leave one token over, which nothing comes before, so that it is not learned.
        lost = (lengths > self.length) & (lengths % self.length == 1)
        return int(lengths.sum(dtype=np.int64) - lost.sum())

    def examples_to_read(self, read: int, held: int) -> int:
        """How many examples to read next, where those that were `read` hold so much; 0 when it is enough.

        A row is one of an example at most, so that rows are read as they are missing. For another unit the number is
        the one expected, and at most as many as were read before: it is reached from below, within a few readings.
        """
        missing = self.count - held
        if missing <= 0:
            return 0
        if self.unit == "rows":
            return missing
        expected = missing * read // held if held else read
        return max(1, min(read, expected))


def streaming_goal(config: Config) -> Goal | None:
    """What the steps of a run consume, with the rows held out; None for a run that reads its data whole."""
    data, training = config.data, config.training
    if not data.streaming or training.max_steps is None:
        return None
    rows = training.max_steps * training.batch_size * training.gradient_accumulation_steps
    if TASKS[config.task].packing == "always" or data.packing:
        # Documents are held out and not sequences: the share of their tokens is about the same.
        tokens = math.ceil(rows * data.max_length / (1 - data.val_split))
        return Goal("tokens", tokens, data.max_length)
    unit = "answers" if TASKS[config.task].kind == "judged" else "rows"
    return Goal(unit, _with_held_out(rows, data.val_split))


def _with_held_out(rows: int, share: float) -> int:
    """The smallest number of rows of which so many are left when a share, and at least one, is held out."""
    if not share:
        return rows
    count = rows + 1
    while (missing := rows - count + max(1, floor_share(count, share))) > 0:
        count += missing
    return count
