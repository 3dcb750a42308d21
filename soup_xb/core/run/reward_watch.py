"""Whether sampled answers earn different rewards: a group that earns the same throughout teaches nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import define

from soup_xb.core.errors import ModelError, Problem
from soup_xb.core.run.events import Event, StepEvent

# Steps in a row before the warning: a tenth of the run, within these bounds.
_FEWEST, _MOST = 2, 10
_EQUAL = "equal_groups"
_WAY_OUT = (
    "read some answers (`soupx generate`). Let the prompts ask for what the rewards look for, by example; try "
    "`training.answer_pattern` on an answer; pay for a first part of the way by a function of your own; raise "
    "`training.max_new_tokens` where answers are cut off (`cut_off` in metrics.jsonl), and `training.temperature` or "
    "`training.group_size` where all answers are alike."
)


@define
class RewardWatch:
    """Follows the steps of a run of `total_steps`, and warns once."""

    total_steps: int
    equal: int = 0
    warned: bool = False

    @property
    def patience(self) -> int:
        """So many steps in a row that teach nothing are worth a warning.

        >>> [RewardWatch(total_steps).patience for total_steps in (4, 50, 1000)]
        [2, 5, 10]
        """
        return min(_MOST, max(_FEWEST, self.total_steps // 10))

    def after(self, step: int, means: Mapping[str, float]) -> Problem | None:
        """Take the means of a step. Returns the warning once `patience` steps in a row taught nothing."""
        self.equal = self.equal + 1 if means.get(_EQUAL) == 1 else 0
        if self.warned or self.equal < self.patience:
            return None
        self.warned = True
        text = (
            f"{self.equal} steps in a row, from step {step - self.equal + 1}, in which no answer earned more than "
            f"another one to the same prompt ({means['reward']:.3g} on average): nothing is learned from them"
        )
        return Problem("equal-rewards", text, f"step {step}", _WAY_OUT)


def check_rewards(events: Iterable[Event], where: str) -> None:
    """Raise ModelError where in no step of a run any answer earned more than another one to its prompt."""
    steps = [event for event in events if isinstance(event, StepEvent)]
    if not steps or any(event.means.get(_EQUAL) != 1 for event in steps):
        return
    earned = [event.means["reward"] for event in steps]
    least, most = f"{min(earned):.3g}", f"{max(earned):.3g}"
    between = least if least == most else f"{least} to {most}"
    raise ModelError(
        "equal-rewards",
        f"in none of {len(steps)} steps did any answer earn more than another to the same prompt (a step's rewards: "
        f"{between} on average), so the adapter learned nothing and adds nothing to the base",
        where=where,
        help=_WAY_OUT,
    )
