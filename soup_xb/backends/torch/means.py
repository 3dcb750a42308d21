"""Means over the examples of a step, told beside its loss: sums of this process, added up over all of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from soup_xb.backends.torch.processes import Processes


class Means:
    """Sums and counts by name. All processes add the same names, with no values where they have no example."""

    def __init__(self, processes: Processes, place: torch.device) -> None:
        """Add up on `place`, which messages between processes go from."""
        self._processes, self._place = processes, place
        self._sums: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Begin a step."""
        self._sums = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take values (n,) of some examples, which carry no gradient."""
        for name, each in values.items():
            pair = torch.stack([each.double().sum(), each.new_tensor(each.numel(), dtype=torch.float64)])
            self._sums[name] = self._sums.get(name, torch.zeros(2, dtype=torch.float64)) + pair.cpu()

    def told(self) -> tuple[int, dict[str, float]]:
        """The number of examples of the first name, and the means, the same on every process."""
        if not self._sums:
            return 0, {}
        precise = torch.float32 if self._place.type == "mps" else torch.float64
        shared = torch.stack(list(self._sums.values())).to(self._place, precise)
        self._processes.sum_([shared])
        pairs = dict(zip(self._sums, shared.tolist(), strict=True))
        means = {name: total / count for name, (total, count) in pairs.items() if count}
        return int(next(iter(pairs.values()))[1]), means
