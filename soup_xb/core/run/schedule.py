"""When things happen in a run, and the learning rate of each step. Steps count from 1."""

from __future__ import annotations

import math
from bisect import bisect_left

from attrs import frozen

# Keeps a product such as 100 * 0.29, which floating point puts just below 29, from landing on 28.
_ROUNDING = 1e-9


def floor_share(size: int, ratio: float) -> int:
    """floor(size * ratio), as arithmetic on paper would have it.

    >>> floor_share(100, 0.29)
    29
    """
    return math.floor(size * ratio + _ROUNDING)


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Steps of rising learning rate, at least one when the ratio is not zero.

    >>> warmup_steps(total_steps=30, warmup_ratio=0.01)
    1
    """
    if warmup_ratio == 0:
        return 0
    return min(total_steps, max(1, floor_share(total_steps, warmup_ratio)))


@frozen
class LearningRates:
    """The learning rate of each step: a linear rise to `peak` over `warmup` steps, then the `scheduler`'s fall.

    The last warm-up step has the peak, so no step is spent on a rate of zero. `linear` and `cosine` fall from
    the peak towards zero, which they would reach one step after the last; `constant` stays. In the `rewarm` steps
    after each of `restarts` the rate rises linearly to where it would be without (ReLoRA, arXiv:2307.05695).
    """

    peak: float
    scheduler: str
    warmup: int
    total_steps: int
    restarts: tuple[int, ...] = ()
    rewarm: int = 0

    def at(self, step: int) -> float:
        """Learning rate of `step`, which counts from 1.

        >>> rates = LearningRates(peak=1.0, scheduler="linear", warmup=2, total_steps=6)
        >>> [rates.at(step) for step in range(1, 7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        >>> rates = LearningRates(1.0, "constant", warmup=0, total_steps=6, restarts=(2,), rewarm=2)
        >>> [rates.at(step) for step in range(1, 7)]
        [1.0, 1.0, 0.5, 1.0, 1.0, 1.0]
        """
        last = bisect_left(self.restarts, step) - 1
        since = step - self.restarts[last] if last >= 0 else self.rewarm
        return self._planned(step) * (since / self.rewarm if since < self.rewarm else 1.0)

    def _planned(self, step: int) -> float:
        if step <= self.warmup:
            return self.peak * step / self.warmup
        progress = (step - 1 - self.warmup) / max(1, self.total_steps - self.warmup)
        if self.scheduler == "linear":
            return self.peak * (1.0 - progress)
        if self.scheduler == "cosine":
            return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.peak


def steps_every(every: int | None, total_steps: int) -> tuple[int, ...]:
    """The multiples of `every` up to and including the last step, which is always among them.

    >>> steps_every(4, 10), steps_every(None, 10)
    ((4, 8, 10), ())
    """
    if every is None:
        return ()
    steps = tuple(range(every, total_steps + 1, every))
    return steps if steps and steps[-1] == total_steps else (*steps, total_steps)


def restart_steps(total_steps: int, every: int | None, warmup_ratio: float) -> tuple[int, ...]:
    """The steps at whose end a ReLoRA restart fires.

    Step s is one when `s % every == 0`, `s >= floor(warmup_ratio * total_steps)` and s is not the last step,
    after which nothing could be learned.

    >>> restart_steps(total_steps=100, every=20, warmup_ratio=0.3)
    (40, 60, 80)
    """
    if every is None:
        return ()
    first = floor_share(total_steps, warmup_ratio)
    return tuple(step for step in range(every, total_steps, every) if step >= first)
