"""Whether the loss recovered from a ReLoRA restart."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from attrs import define, field

from soup_xb.core.errors import Problem

WINDOW = 20
TOLERANCE = 0.05


def _window(losses: Iterable[float]) -> deque[float]:
    return deque(losses, maxlen=2 * WINDOW)


@define
class RestartWatch:
    """Compares the mean loss of the 20 steps after each restart with that of the 20 before it.

    `losses` are those of the steps just before the first one that it will be told, for a run that goes on.
    """

    restart_steps: tuple[int, ...]
    losses: deque[float] = field(default=(), converter=_window)

    def after(self, step: int, loss: float) -> Problem | None:
        """Take the loss of a step. Returns the warning when it stays more than 5% higher after a restart.

        Silent where it does not know all 40 losses.
        """
        self.losses.append(loss)
        restart = step - WINDOW
        if restart not in self.restart_steps or len(self.losses) < 2 * WINDOW:
            return None
        losses = list(self.losses)
        before, after = sum(losses[:WINDOW]) / WINDOW, sum(losses[WINDOW:]) / WINDOW
        # The loss of a task that earns rewards is below zero.
        if after <= before + TOLERANCE * abs(before):
            return None
        share = (after - before) / abs(before) if before else math.inf
        return Problem(
            "restart-hurts",
            f"mean loss {after:.4f} in the {WINDOW} steps after the restart at step {restart}, "
            f"{before:.4f} in the {WINDOW} before: {share:.0%} higher",
            where=f"step {step}",
            help="lower `training.relora_prune_ratio`, raise `training.relora_steps`, or use `relora_mode: merge`.",
        )
