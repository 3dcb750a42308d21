"""The largest micro-batch of a run, which its memory is counted by: what goes through the model together."""

from __future__ import annotations

from attrs import frozen

from soup_xb.core.config.schema import PAIRED, SAMPLED, Config
from soup_xb.core.objectives.head_chunks import positions_at_once
from soup_xb.core.rows.row_facts import RowFacts


@frozen
class LargestBatch:
    """Of one of `processes`: its `tokens` with their padding, and how many of them go `through_head` together."""

    tokens: int
    through_head: int
    processes: int = 1

    @classmethod
    def of(
        cls, config: Config, facts: RowFacts, vocabulary: int, backend: str, processes: int
    ) -> LargestBatch:
        """A run's, from its rows: both answers of a pair, all answers to a prompt, all texts of a row that embeds."""
        task, training = config.task, config.training
        rows = training.batch_size // processes
        longest = int(facts.lengths.max())
        if task == "embedding":
            return cls(rows * int(facts.tokens.max()), 0, processes)
        if task in SAMPLED:
            answers = rows * training.group_size
            # The tokens of all answers are weighed together.
            new = training.max_new_tokens
            return cls(answers * (longest + new), answers * new, processes)
        if task == "reward":
            return cls(2 * rows * longest, 2 * rows, processes)
        tokens = rows * longest * (2 if task in PAIRED else 1)
        together = tokens if backend == "mlx" else positions_at_once(tokens, vocabulary)
        return cls(tokens, together, processes)
