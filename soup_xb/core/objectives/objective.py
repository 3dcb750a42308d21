"""What a task optimizes: what it asks of the model, its constants, its losses and what it carries from step to step.

An objective is the same object for every backend: a backend computes log-probabilities, scores or embeddings, hands in
its array namespace, and gets one loss for each example back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np

from soup_xb.core.objectives import losses
from soup_xb.core.rows.batches import MicroBatch

Array = np.ndarray[Any, Any]
X = Any
Constants = dict[str, Array]
# For each metric its values (n,) and which of them count (n,), 1 or 0.
Metrics = dict[str, tuple[X, X]]
# A lead below this share of the log-probabilities that it comes from is float32's rounding. Before the first update
# there is nothing else in it: the model is the reference.
_ROUNDING = 2.0**-19
Sums = Mapping[str, tuple[float, float]]


class Scorer(Protocol):
    """The model asked about answers: without gradients and dropout, and without touching any training state."""

    def token_logps(self, batch: MicroBatch, temperature: float = 1.0, adapter: bool = True) -> Array:
        """Log-probability (nats) of each target, float32 (rows, width) as `batch.targets`, 0 where nothing is trained.

        Logits are divided by `temperature`; `adapter=False` asks the true base.
        """

    def sum(self, values: Array) -> Array:
        """Float64 values summed over all processes, the same on each; it waits for all of them."""


class Objective(ABC):
    """What a step or an evaluation asks of a task.

    `outputs` is what the model gives for a batch: log-probabilities of its targets (rows, width), at `temperature`;
    scores (rows,); or embeddings, those of the anchors (rows, width) and of all processes' candidates (m, width).
    """

    outputs: Literal["logps", "scores", "embeddings"] = "logps"
    temperature = 1.0

    @abstractmethod
    def constants(self, scorer: Scorer, batch: MicroBatch) -> Constants:
        """What `losses` needs beside the model's outputs, as arrays; float64 becomes the backend's float32."""

    @abstractmethod
    def losses(
        self, xp: X, outputs: X, constants: Mapping[str, X], scalars: Mapping[str, X]
    ) -> tuple[X, Metrics]:
        """One loss for each example of a batch (n,), and metrics of the same shape.

        `xp` is the array namespace (see core.objectives.losses). Pure: nothing is kept, no value is branched on.
        """

    def before_step(self, scorer: Scorer, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Scalars that come from a whole step or evaluation, over all its micro-batches and processes."""
        return {}

    def observed(self, batch: MicroBatch) -> Mapping[str, Array]:
        """Metrics (n,) of a batch that are known without the model."""
        return {}

    def divisor(self, target_weight: float, examples: int) -> float:
        """What the sum of a whole step's losses is divided by, from the sum of its targets' weights and its rows."""
        return examples

    def examples(self, sums: Sums) -> int:
        """The examples that were judged, from sums over all processes; 0 for an objective over tokens."""
        return int(next(iter(sums.values()))[1]) if sums else 0

    def means(self, sums: Sums, scalars: Mapping[str, float]) -> dict[str, float]:
        """What is reported beside the loss."""
        return means_of(sums)

    def after_step(self, sums: Sums) -> None:  # noqa: B027
        """Move on what is carried from step to step; `sums` are those of all processes."""

    def state(self) -> dict[str, float]:
        """What is carried from step to step, for checkpoints."""
        return {}

    def load(self, state: Mapping[str, float]) -> None:  # noqa: B027
        """Take over what a checkpoint kept."""


class MetricSums:
    """Sums and counts in float64. All processes add the same names in the same order, with zeros for no example."""

    def __init__(self) -> None:
        self._sums: dict[str, Array] = {}

    def add(self, names: Iterable[str], sums: Array) -> None:
        """Add sums and counts (names, 2) of a micro-batch."""
        for name, pair in zip(names, np.asarray(sums, dtype=np.float64), strict=True):
            self._sums[name] = self._sums.get(name, np.zeros(2)) + pair

    def add_values(self, values: Mapping[str, Array], counted: Array) -> None:
        """Add values (n,) of examples of which `counted` (n,) is 1, or 0 for one that counts for nothing."""
        for name, each in values.items():
            self.add([name], np.array([[np.sum(each * counted), np.sum(counted)]], dtype=np.float64))

    def shared(self, sum_over_processes: Callable[[Array], Array]) -> dict[str, tuple[float, float]]:
        """Each name's sum and count over all processes, the same on every one."""
        if not self._sums:
            return {}
        totals = sum_over_processes(np.stack(list(self._sums.values())))
        return {name: (float(pair[0]), float(pair[1])) for name, pair in zip(self._sums, totals, strict=True)}


def means_of(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The mean of each name that has an example."""
    return {name: total / count for name, (total, count) in sums.items() if count}


class StepState:
    """An objective over the micro-batches of one step or evaluation: `begin`, each batch, then `finish`."""

    def __init__(self, objective: Objective, scorer: Scorer) -> None:
        self.objective, self.scorer = objective, scorer
        self.scalars: dict[str, float] = {}
        self.sums = MetricSums()

    def begin(self, batches: Sequence[MicroBatch]) -> None:
        """Compute what comes from all micro-batches together."""
        self.sums = MetricSums()
        self.scalars = self.objective.before_step(self.scorer, batches)

    def constants(self, batch: MicroBatch) -> Constants:
        """What the objective knows of a micro-batch beside the model's outputs."""
        self.sums.add_values(self.objective.observed(batch), batch.counted)
        return self.objective.constants(self.scorer, batch)

    def finish(self, training: bool) -> tuple[int, dict[str, float]]:
        """The examples that were judged, over all processes, and means over them.

        After a training step what the objective carries from step to step moves on.
        """
        sums = self.sums.shared(self.scorer.sum)
        if training:
            self.objective.after_step(sums)
        return self.objective.examples(sums), self.objective.means(sums, self.scalars)


class TokenObjective(Objective):
    """Cross-entropy of the trained tokens; the loss of a step is its sum divided by the sum of their weights."""

    def constants(self, scorer: Scorer, batch: MicroBatch) -> Constants:
        return {"weights": batch.weights}

    def losses(
        self, xp: X, outputs: X, constants: Mapping[str, X], scalars: Mapping[str, X]
    ) -> tuple[X, Metrics]:
        return losses.cross_entropy(xp, outputs, constants["weights"]), {}

    def divisor(self, target_weight: float, examples: int) -> float:
        return target_weight

    def examples(self, sums: Sums) -> int:
        return 0


class PairObjective(Objective):
    """A loss over pairs of answers; the first half of a batch's rows is chosen, the other rejected in the same order.

    A pair's rewards are beta times what its log-probabilities gained on the reference, or those themselves.
    """

    def __init__(self, loss: Callable[..., X], settings: Mapping[str, Any], measures: Measures) -> None:
        """Compute `loss` with its keys out of `settings`; `measures` are further metrics of the same statistics."""
        self._loss, self._settings, self._measures = loss, _own(loss, settings), measures
        asked = losses.statistics(loss)
        self._lead = "_mean" if "rejected_mean" in asked else ""
        self._reference = any(name.startswith("ref_") for name in asked)

    def constants(self, scorer: Scorer, batch: MicroBatch) -> Constants:
        known = {"weights": batch.weights}
        return {**known, "reference": _reference(batch)} if self._reference else known

    def losses(
        self, xp: X, outputs: X, constants: Mapping[str, X], scalars: Mapping[str, X]
    ) -> tuple[X, Metrics]:
        known = _pair_statistics(xp, outputs, constants)
        each = _call(self._loss, xp, known, **self._settings)
        rewards = [known[side + self._lead] for side in ("chosen", "rejected")]
        if self._reference:
            rewards = [
                value - known[f"ref_{side}{self._lead}"]
                for value, side in zip(rewards, ("chosen", "rejected"), strict=True)
            ]
        beta = self._settings["beta"]
        noise = beta * _ROUNDING * (abs(known["chosen"]) + abs(known["rejected"]))
        told = _pair_metrics(xp, beta * rewards[0], beta * rewards[1], noise)
        told |= {name: _counting(xp, _call(measure, xp, known)) for name, measure in self._measures.items()}
        return each, told


class ScoreObjective(Objective):
    """A loss over the scores of pairs of answers, for a reward model."""

    outputs = "scores"

    def __init__(self, loss: Callable[..., X], settings: Mapping[str, Any], measures: Measures) -> None:
        self._loss = loss

    def constants(self, scorer: Scorer, batch: MicroBatch) -> Constants:
        return {}

    def losses(
        self, xp: X, outputs: X, constants: Mapping[str, X], scalars: Mapping[str, X]
    ) -> tuple[X, Metrics]:
        chosen, rejected = _halves(outputs)
        noise = _ROUNDING * (abs(chosen) + abs(rejected))
        return self._loss(xp, chosen, rejected), _pair_metrics(xp, chosen, rejected, noise)


class JudgedObjective(Objective):
    """A loss over answers that were judged one by one.

    What the loss takes from a whole step (kto's `drift`) comes from all its micro-batches and processes; what it takes
    from all steps before (bco's `shift`) is the same on every process and part of a checkpoint.
    """

    def __init__(self, loss: Callable[..., X], settings: Mapping[str, Any], measures: Measures) -> None:
        self._loss, self._settings = loss, _own(loss, settings)
        self._asked = losses.statistics(loss)
        self._mean, self._count = 0.0, 0

    def before_step(self, scorer: Scorer, batches: Sequence[MicroBatch]) -> dict[str, float]:
        if "drift" in self._asked:
            return {"drift": _drift(scorer, batches)}
        return {"shift": self._mean}

    def constants(self, scorer: Scorer, batch: MicroBatch) -> Constants:
        return {
            "weights": batch.weights,
            "reference": _reference(batch),
            "desirable": batch.constants["desirable"],
        }

    def losses(
        self, xp: X, outputs: X, constants: Mapping[str, X], scalars: Mapping[str, X]
    ) -> tuple[X, Metrics]:
        desirable = constants["desirable"]
        known = {
            "policy": losses.row_sums(xp, outputs, constants["weights"]),
            "ref": constants["reference"],
            "desirable": desirable,
            **scalars,
        }
        beta = self._settings["beta"]
        rewards = beta * (known["policy"] - known["ref"])
        lead = rewards - (beta * scalars["drift"] if "drift" in scalars else scalars["shift"])
        one = 1.0 + 0.0 * rewards
        noise = beta * _ROUNDING * abs(known["policy"])
        right = xp.where(xp.where(desirable, lead, -lead) > noise, one, 0.0 * one)
        return _call(self._loss, xp, known, **self._settings), {
            "reward_accuracy": (right, one),
            "reward_chosen": (rewards, xp.where(desirable, one, 0.0 * one)),
            "reward_rejected": (rewards, xp.where(desirable, 0.0 * one, one)),
            "reward": (rewards, one),
        }

    def means(self, sums: Sums, scalars: Mapping[str, float]) -> dict[str, float]:
        told = means_of({name: pair for name, pair in sums.items() if name != "reward"})
        if {"reward_chosen", "reward_rejected"} <= told.keys():
            told["reward_margin"] = told["reward_chosen"] - told["reward_rejected"]
        return {**told, **{name: value for name, value in scalars.items() if name == "drift"}}

    def after_step(self, sums: Sums) -> None:
        total, count = sums.get("reward", (0.0, 0.0))
        if "shift" in self._asked and count:
            self._count += int(count)
            self._mean += (total - count * self._mean) / self._count

    def state(self) -> dict[str, float]:
        return {"mean": self._mean, "count": float(self._count)} if "shift" in self._asked else {}

    def load(self, state: Mapping[str, float]) -> None:
        if state:
            self._mean, self._count = state["mean"], int(state["count"])


class GroupObjective(Objective):
    """A policy gradient on answers that the model gave a moment ago, weighed by what they earned in their group.

    Each micro-batch is used for one update, so that the policy that sampled is the one that is trained. The loss that
    is reported is the objective's value, beta times the divergence less the reward; its gradient is that of the clipped
    surrogate, whose own value says nothing: advantages sum to zero in every group.
    """

    def __init__(self, loss: Callable[..., X], settings: Mapping[str, Any], measures: Measures) -> None:
        self._loss, self._beta = loss, settings["beta"]
        self._size, self._scale = settings["group_size"], settings["scale_rewards"]
        self.temperature = settings["temperature"]

    def constants(self, scorer: Scorer, batch: MicroBatch) -> Constants:
        if "rewards" not in batch.constants:
            raise RuntimeError("prompts are answered before they are trained on: see core.run.rollouts")
        rewards = batch.constants["rewards"]
        whole = rewards if batch.counted.any() else np.zeros(self._size)
        advantages = losses.group_advantages(np, whole, self._size, self._scale)[: len(rewards)]
        known = {"weights": batch.weights, "rewards": rewards, "advantages": advantages}
        if self._beta:
            known["reference"] = scorer.token_logps(batch, self.temperature, adapter=False)
        return known

    def losses(
        self, xp: X, outputs: X, constants: Mapping[str, X], scalars: Mapping[str, X]
    ) -> tuple[X, Metrics]:
        weights, old = constants["weights"], xp.stop_gradient(outputs)
        reference = constants.get("reference", old)
        each = self._loss(xp, outputs, old, reference, weights, constants["advantages"], beta=self._beta)
        kl = losses.row_means(xp, losses.divergence(xp, old, reference), weights)
        value = self._beta * kl - constants["rewards"]
        # The value of the objective, with the surrogate's gradient.
        return each - xp.stop_gradient(each) + value, {"kl": _counting(xp, kl)} if self._beta else {}

    def observed(self, batch: MicroBatch) -> Mapping[str, Array]:
        return batch.observed

    def divisor(self, target_weight: float, examples: int) -> float:
        return float(examples * self._size)


class EmbeddingObjective(Objective):
    """A loss over texts that belong together, against all other candidates of the micro-batch on all processes."""

    outputs = "embeddings"

    def __init__(self, loss: Callable[..., X], settings: Mapping[str, Any], measures: Measures) -> None:
        self._loss, self._settings = loss, _own(loss, settings)

    def constants(self, scorer: Scorer, batch: MicroBatch) -> Constants:
        # Alone with its positive an anchor has nothing to be told from.
        compared = np.full(len(batch.counted), float(batch.constants["count"] > 1), dtype=np.float32)
        return {"right": batch.constants["right"], "compared": compared}

    def losses(
        self, xp: X, outputs: X, constants: Mapping[str, X], scalars: Mapping[str, X]
    ) -> tuple[X, Metrics]:
        anchors, candidates = outputs
        right, compared = constants["right"], constants["compared"]
        each = self._loss(xp, anchors, candidates, right, **self._settings)
        cosines = losses.cosines(xp, anchors, candidates)
        found = xp.take_along_axis(cosines, right[:, None], 1)
        one = 1.0 + 0.0 * compared
        nearest = xp.sum(xp.where(cosines >= found, 1.0, 0.0), axis=1) < 2
        wrong = xp.sum(cosines, axis=1) - found[:, 0]
        return each, {
            "examples": (one, one),
            "accuracy": (xp.where(nearest, one, 0.0 * one), compared),
            "positive_cosine": (found[:, 0], compared),
            "negative_cosine": (wrong / max(1, len(candidates) - 1), compared),
        }

    def means(self, sums: Sums, scalars: Mapping[str, float]) -> dict[str, float]:
        return means_of({name: pair for name, pair in sums.items() if name != "examples"})


Measures = Mapping[str, Callable[..., X]]
OBJECTIVES: Mapping[str, Callable[[Callable[..., X], Mapping[str, Any], Measures], Objective]] = (
    MappingProxyType(
        {
            "pairs": PairObjective,
            "scores": ScoreObjective,
            "judged": JudgedObjective,
            "groups": GroupObjective,
            "embeddings": EmbeddingObjective,
        }
    )
)


def row_log_probabilities(scorer: Scorer, batch: MicroBatch) -> Array:
    """Log-probability (nats) of each row's targets under the true base, float64 (rows,)."""
    logps = scorer.token_logps(batch, adapter=False).astype(np.float64)
    sums: Array = losses.row_sums(np, logps, batch.weights)
    return sums


def _own(loss: Callable[..., X], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in losses.settings(loss)}


def _call(function: Callable[..., X], xp: X, known: Mapping[str, X], **settings: Any) -> X:
    return function(xp, *(known[name] for name in losses.statistics(function)), **settings)


def _reference(batch: MicroBatch) -> Array:
    known = batch.constants.get("reference")
    if known is None:
        raise RuntimeError("the loss needs the base's log-probabilities, which the plan does not hold")
    return known


def _drift(scorer: Scorer, batches: Sequence[MicroBatch]) -> float:
    """The mean log-ratio to the base on all mismatched answers of all processes, at least 0."""
    sums = np.zeros(2)
    for batch in batches:
        other = batch.beside
        if other is None:
            raise RuntimeError("kto needs batches with mismatched answers: see core.rows.judged")
        logps = scorer.token_logps(other).astype(np.float64)
        ratios = losses.row_sums(np, logps, other.weights) - _reference(other)
        sums += [(ratios * other.counted).sum(), other.counted.sum()]
    total, count = scorer.sum(sums)
    return max(0.0, float(total / max(count, 1.0)))


def _pair_statistics(xp: X, logps: X, constants: Mapping[str, X]) -> dict[str, X]:
    weights = constants["weights"]
    counts = losses.row_counts(xp, weights)
    found = {"": losses.row_sums(xp, logps, weights)}
    if "reference" in constants:
        found["ref_"] = constants["reference"]
    known = {}
    for prefix, sums in found.items():
        known[f"{prefix}chosen"], known[f"{prefix}rejected"] = _halves(sums)
        known[f"{prefix}chosen_mean"], known[f"{prefix}rejected_mean"] = _halves(sums / counts)
    return known


def _halves(values: X) -> tuple[X, X]:
    half = len(values) // 2
    return values[:half], values[half:]


def _pair_metrics(xp: X, chosen: X, rejected: X, noise: X) -> Metrics:
    """Rewards, their margin, and how often the chosen answer leads; a tie, within `noise`, counts as lost."""
    margin = chosen - rejected
    one = 1.0 + 0.0 * margin
    told = {
        "reward_accuracy": xp.where(margin > noise, one, 0.0 * one),
        "reward_margin": margin,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    return {name: (values, one) for name, values in told.items()}


def _counting(xp: X, values: X) -> tuple[X, X]:
    return values, 1.0 + 0.0 * values
