"""The rows of tasks that sample: a prompt that the model answers, and what its answers earned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from attrs import field, frozen

from soup_xb.core.rows.examples import Source, TokenRow

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class PromptRow:
    """A tokenized prompt, int32 (length,), to its last token before the answer.

    `columns` is the row of the data file, for rewards. `number` is the row's place among those of its set, which
    the random numbers of its answers come from.
    """

    tokens: Array
    columns: Mapping[str, Any]
    source: Source
    number: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.tokens.size)

    @property
    def real_tokens(self) -> int:
        """Tokens of the prompt; those of its answers are not known beforehand."""
        return self.length

    @property
    def target_tokens(self) -> int:
        """None are known beforehand."""
        return 0

    @property
    def sequences(self) -> tuple[TokenRow, ...]:
        """The prompt as a row without a target."""
        return (TokenRow(self.tokens, np.zeros(self.length, dtype=np.bool_), self.source),)


@frozen(eq=False)
class Rollout:
    """What the sampled answers of a micro-batch earned; all answers to one prompt stand together.

    `rewards` is float64 (answers,); `told` are metrics of the same shape, of which means are told.
    """

    rewards: Array
    told: Mapping[str, Array] = field(factory=dict)
