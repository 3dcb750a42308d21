"""Every loss on torch, MLX and NumPy; and a step's total, however its rows are split.

NumPy in float64 is the oracle: its values, and its central differences for the gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from attrs import evolve, frozen

from soup_xb.backends.mlx.step import XP as MLX
from soup_xb.backends.torch.step import XP as TORCH
from soup_xb.core.config.schema import Config, DataConfig, TrainingConfig
from soup_xb.core.objectives import losses
from soup_xb.core.objectives.objective import StepState, row_log_probabilities
from soup_xb.core.rows.batches import MicroBatch, micro_batches, sequence_batches
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.judged import learned_rows
from soup_xb.core.rows.row import Prompt, Row, TokenSequence
from soup_xb.core.rows.table import Rows, as_rows
from soup_xb.core.run.plan import objective_of
from soup_xb.core.run.rollouts import RolloutSession, Rules
from soup_xb.core.run.session import GenerationSettings, LossSum, StepResult, StepSettings
from soup_xb.core.tasks import TASKS

Array = np.ndarray[Any, Any]
NUMPY = SimpleNamespace(
    **{
        **{name: getattr(np, name, None) for name in losses.NAMESPACE},
        "stop_gradient": lambda values: values,
        "logsumexp": lambda values, axis: (
            np.log(np.exp(values - values.max(axis, keepdims=True)).sum(axis)) + values.max(axis)
        ),
    }
)


@frozen(eq=False)
class Case:
    """A loss: `moving` arrays have gradients, `fixed` ones follow them, `keys` are its settings.

    `smooth` is False where an array lies at a clamp, of which central differences are no gradient.
    """

    loss: Callable[..., Any]
    moving: tuple[Array, ...]
    fixed: tuple[Array, ...] = ()
    keys: Mapping[str, Any] = {}
    smooth: bool = True
    gradient_tolerance: float = 1e-6

    def of(self, xp: Any, moving: Sequence[Any], fixed: Sequence[Any]) -> Any:
        return self.loss(xp, *moving, *fixed, **self.keys)


def drawn(seed: int, *shape: int, scale: float = 1.0, around: float = 0.0) -> Array:
    """Numbers that float32 has, as float64: all namespaces see the same."""
    values = np.random.default_rng(seed).normal(size=shape) * scale + around
    return values.astype(np.float32).astype(np.float64)


def single(*values: float) -> Array:
    return np.array(values, dtype=np.float32).astype(np.float64)


# Answers of many tokens; reference and policy are near each other.
CHOSEN, REJECTED = drawn(1, 8, scale=6, around=-20), drawn(2, 8, scale=6, around=-20)
BASE, OTHER_BASE = CHOSEN + drawn(3, 8), REJECTED + drawn(4, 8)
MEANS = drawn(5, 8, scale=0.5, around=-2), drawn(6, 8, scale=0.5, around=-2)
BASE_MEANS = MEANS[0] + drawn(7, 8, scale=0.3), MEANS[1] + drawn(8, 8, scale=0.3)
VERDICTS = np.arange(8) % 3 != 1
# Far beyond what float32's exp can hold, and answers that are certain.
FAR = single(-1000, -1, -1000, 0, -0.25, -40), single(-1, -1000, -1000, -40, 0, -0.25)
CERTAIN = single(0, -1e-8, -1e-6, -1, -1, -1), single(-1, -1, -1, 0, -1e-8, -1e-6)
WEIGHTS = (np.arange(5) < np.array([5, 3, 0, 1, 4, 2])[:, None]).astype(np.float64)
LOGPS, OLD = drawn(9, 6, 5, scale=0.4, around=-2), drawn(10, 6, 5, scale=0.4, around=-2)
REFERENCE, ADVANTAGES = drawn(11, 6, 5, scale=0.4, around=-2), single(1.5, -0.75, 0, 2, -2, 0.25)
ANCHORS, CANDIDATES = drawn(12, 4, 6), drawn(13, 7, 6)
RIGHT = np.array([0, 3, 1, 6])

CASES = {
    "row_sums": Case(losses.row_sums, (LOGPS,), (WEIGHTS,)),
    "row_means": Case(losses.row_means, (LOGPS,), (WEIGHTS,)),
    "row_means, weighted": Case(losses.row_means, (LOGPS,), (WEIGHTS * 0.5,)),
    "row_counts": Case(losses.row_counts, (), (WEIGHTS,)),
    "cross_entropy": Case(losses.cross_entropy, (LOGPS,), (WEIGHTS,)),
    "dpo": Case(losses.dpo, (CHOSEN, REJECTED), (BASE, OTHER_BASE), {"label_smoothing": 0.0}),
    "dpo, smoothed": Case(
        losses.dpo, (CHOSEN, REJECTED), (BASE, OTHER_BASE), {"beta": 0.5, "label_smoothing": 0.2}
    ),
    "dpo, far": Case(losses.dpo, FAR, FAR[::-1], {"label_smoothing": 0.1}),
    "ipo": Case(losses.ipo, MEANS, BASE_MEANS),
    "ipo, far": Case(losses.ipo, FAR, FAR[::-1], smooth=False),
    "orpo": Case(losses.orpo, MEANS, keys={"beta": 0.3}),
    "orpo, far": Case(losses.orpo, FAR, smooth=False),
    "orpo, certain": Case(losses.orpo, CERTAIN, smooth=False),
    "odds_margin": Case(losses.odds_margin, MEANS),
    "simpo": Case(losses.simpo, MEANS, keys={"simpo_gamma": 0.5, "label_smoothing": 0.0}),
    "simpo, smoothed": Case(losses.simpo, MEANS, keys={"simpo_gamma": 1.0, "label_smoothing": 0.1}),
    "simpo, far": Case(losses.simpo, FAR, keys={"simpo_gamma": 1.0, "label_smoothing": 0.0}),
    "simpo, likely": Case(
        losses.simpo, MEANS, keys={"simpo_gamma": 0.5, "label_smoothing": 0.0, "cpo_alpha": 0.5}
    ),
    "cpo": Case(losses.cpo, (CHOSEN, REJECTED, MEANS[0]), keys={"label_smoothing": 0.0}),
    "cpo, smoothed": Case(
        losses.cpo,
        (CHOSEN, REJECTED, MEANS[0]),
        keys={"beta": 0.5, "label_smoothing": 0.2, "cpo_alpha": 0.25},
    ),
    "cpo, preference alone": Case(
        losses.cpo, (CHOSEN, REJECTED, MEANS[0]), keys={"label_smoothing": 0.0, "cpo_alpha": 0.0}
    ),
    "cpo, far": Case(losses.cpo, (*FAR, FAR[0] / 8), keys={"label_smoothing": 0.0}),
    "kto": Case(
        losses.kto,
        (CHOSEN,),
        (BASE, VERDICTS, single(0.75)[0]),
        {"desirable_weight": 1.25, "undesirable_weight": 0.5},
    ),
    "kto, far": Case(
        losses.kto,
        FAR[:1],
        (FAR[1], VERDICTS[:6], single(0.0)[0]),
        {"desirable_weight": 1.0, "undesirable_weight": 1.0},
    ),
    "bco": Case(losses.bco, (CHOSEN,), (BASE, VERDICTS, single(-0.25)[0])),
    "bco, far": Case(losses.bco, FAR[:1], (FAR[1], VERDICTS[:6], single(0.5)[0])),
    "reward": Case(losses.reward, (drawn(14, 6, scale=3), drawn(15, 6, scale=3))),
    "reward, far": Case(losses.reward, (single(1000, -1000, 5), single(-1000, 1000, 5))),
    "grpo": Case(losses.grpo, (LOGPS,), (OLD, REFERENCE, WEIGHTS, ADVANTAGES)),
    "grpo, narrow": Case(
        losses.grpo, (LOGPS,), (OLD, REFERENCE, WEIGHTS, ADVANTAGES), {"epsilon": (0.1, 0.3), "beta": 0.5}
    ),
    "grpo, far": Case(
        losses.grpo,
        (single(-1000, 0, -30, -1)[:, None],),
        (
            single(0, -30, -25, -1)[:, None],
            single(-1, -35, -32, 0)[:, None],
            np.ones((4, 1)),
            single(1, -1, 0, 0.5),
        ),
        smooth=False,
    ),
    "divergence": Case(losses.divergence, (LOGPS,), (REFERENCE,)),
    "group_advantages": Case(losses.group_advantages, (drawn(16, 12),), keys={"size": 4, "scale": True}),
    "group_advantages, bare": Case(
        losses.group_advantages, (drawn(16, 12),), keys={"size": 4, "scale": False}
    ),
    "embedding": Case(losses.embedding, (ANCHORS, CANDIDATES), (RIGHT,), {"embedding_scale": 2.0}),
    # The gradient of a vector's direction is a difference of larger numbers.
    "embedding, sharp": Case(losses.embedding, (ANCHORS, CANDIDATES), (RIGHT,), gradient_tolerance=1e-5),
    "cosines": Case(losses.cosines, (ANCHORS, CANDIDATES)),
}


def test_every_loss_has_a_case() -> None:
    functions = {
        name
        for name, function in inspect.getmembers(losses, inspect.isfunction)
        if function.__module__ == losses.__name__
        and not name.startswith("_")
        and next(iter(inspect.signature(function).parameters)) == "xp"
    }
    assert functions == {name.split(",")[0] for name in CASES}
    assert {task.loss.__name__ for task in TASKS.values()} <= functions


@frozen(eq=False)
class Found:
    """Losses of each example, and the gradients of their weighted sum."""

    values: Array
    gradients: tuple[Array, ...]


def shares(count: int) -> Array:
    """The weights of the sum whose gradients are compared."""
    return np.linspace(0.5, 1.5, count).astype(np.float32).astype(np.float64)


def on_numpy(case: Case) -> Found:
    """Values in float64, and central differences."""

    def total(moving: Sequence[Array]) -> float:
        each = np.asarray(case.of(NUMPY, moving, case.fixed)).reshape(-1)
        return float((each * shares(each.size)).sum())

    gradients = []
    for place, array in enumerate(case.moving):
        gradient = np.zeros_like(array)
        for index in np.ndindex(*array.shape):
            step = 1e-6 * max(1.0, abs(array[index]))
            sides = []
            for moved in (array[index] + step, array[index] - step):
                changed = [one.copy() for one in case.moving]
                changed[place][index] = moved
                sides.append(total(changed))
            gradient[index] = (sides[0] - sides[1]) / (2 * step)
        gradients.append(gradient)
    return Found(np.asarray(case.of(NUMPY, case.moving, case.fixed)), tuple(gradients))


def on_torch(case: Case) -> Found:
    leaves = [torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in case.moving]
    fixed = [torch.from_numpy(np.asarray(array)) for array in case.fixed]
    fixed = [array.float() if array.is_floating_point() else array for array in fixed]
    each = case.of(TORCH, leaves, fixed)
    assert each.dtype == torch.float32
    if not leaves:
        return Found(each.numpy(), ())
    total = (each.reshape(-1) * torch.from_numpy(shares(each.numel())).float()).sum()
    gradients = torch.autograd.grad(total, leaves)
    return Found(each.detach().numpy(), tuple(one.numpy() for one in gradients))


def on_mlx(case: Case, compiled: bool) -> Found:
    leaves = [mx.array(array.astype(np.float32)) for array in case.moving]
    fixed = [
        mx.array(array.astype(np.float32) if array.dtype == np.float64 else array)
        for array in map(np.asarray, case.fixed)
    ]

    def total(leaves: list[mx.array], fixed: list[mx.array]) -> tuple[mx.array, mx.array]:
        each = case.of(MLX, leaves, fixed)
        return (each.reshape(-1) * mx.array(shares(each.size).astype(np.float32))).sum(), each

    function = mx.value_and_grad(total) if leaves else lambda *arrays: (total(*arrays), [])
    (_, each), gradients = (mx.compile(function) if compiled else function)(leaves, fixed)
    assert each.dtype == mx.float32
    return Found(np.array(each), tuple(np.array(one) for one in gradients))


WAYS: dict[str, Callable[[Case], Found]] = {
    "torch": on_torch,
    "mlx": lambda case: on_mlx(case, compiled=False),
    "mlx, compiled": lambda case: on_mlx(case, compiled=True),
}


def assert_near(found: Array, expected: Array, tolerance: float) -> None:
    """Within the tolerance, relative to what is larger than 1."""
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    off = np.abs(found.astype(np.float64) - expected) / np.maximum(1.0, np.abs(expected))
    assert off.max(initial=0.0) <= tolerance


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_that_of_float64(name: str, way: str) -> None:
    case = CASES[name]
    assert_near(WAYS[way](case).values, on_numpy(case).values, 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_loss_has_one_gradient_on_torch_and_on_mlx_compiled_or_not(name: str) -> None:
    case = CASES[name]
    first, *others = (way(case) for way in WAYS.values())
    for other in others:
        for gradient, expected in zip(other.gradients, first.gradients, strict=True):
            assert_near(gradient, expected.astype(np.float64), case.gradient_tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.smooth])
def test_the_gradient_of_a_loss_is_that_of_central_differences(name: str, way: str) -> None:
    case = CASES[name]
    for gradient, expected in zip(WAYS[way](case).gradients, on_numpy(case).gradients, strict=True):
        assert_near(gradient, expected, 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_far_on_its_side_keeps_the_digits_of_a_small_loss(way: str) -> None:
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    fixed = (single(0, 0), np.array([True, False]), single(0)[0])
    case = Case(losses.kto, (single(400, -400),), fixed, {**weights, "beta": 0.1})
    found = WAYS[way](case)
    assert found.values == pytest.approx(np.full(2, np.exp(-40.0)), rel=1e-5, abs=0.0)
    assert found.gradients[0] == pytest.approx(np.exp(-40.0) * np.array([-0.05, 0.15]), rel=1e-5, abs=0.0)


# From here on: steps. A model whose answers are numbers computed from the tokens.
PAD = 0
ROWS = 9
# Every way to have the nine rows of a step: which of them are together, and among how many processes each is split.
SPLITS: dict[str, tuple[Sequence[Sequence[int]], int]] = {
    "one by one": ([[row] for row in range(ROWS)], 1),
    "uneven parts": ([[4], [0, 8, 2, 5, 1], [7, 3, 6]], 1),
    "two processes": ([[0, 1, 2, 3, 4], [5, 6, 7], [8]], 2),
    "more processes than rows": ([[0, 1, 2, 3, 4, 5, 6], [7, 8]], 8),
}
TOGETHER = [list(range(ROWS))]


def sequence(seed: int, length: int, prompt: int) -> TokenSequence:
    tokens = np.random.default_rng(seed).integers(3, 250, length)
    return TokenSequence(tokens, np.arange(length) >= prompt, Source("rows.jsonl", seed + 1))


def rows_of(kind: str) -> Rows:
    """Rows of different lengths."""
    made = []
    for row in range(ROWS):
        length, prompt = 5 + 3 * (row % 4), 2 + row % 3
        sides = tuple(sequence(10 * row + side, length + side, prompt) for side in range(3))
        made.append(
            {
                "tokens": Row("tokens", sides[:1]),
                "pair": Row("pair", sides[:2]),
                "judged": Row("judged", sides[:1], extra=row % 3 != 0),
                "prompt": Row("prompt", (evolve(sides[0], trained=[False] * length),), Prompt({}, row)),
                "embedding": Row("embedding", sides[: 2 + row % 2]),
            }[kind]
        )
    return as_rows(made)


class Model:
    """What a session is asked for."""

    def token_logps(self, batch: MicroBatch, temperature: float = 1.0, adapter: bool = True) -> Array:
        before = batch.tokens.reshape(-1)[batch.positions]
        angle = 0.7 * batch.targets + 0.3 * before + (0.0 if adapter else 0.4)
        each = (-0.5 - np.sin(angle) ** 2) / temperature
        return np.where(batch.weights != 0, each, 0.0).astype(np.float32)

    def sum(self, values: Array) -> Array:
        return values

    def scores(self, batch: MicroBatch) -> Array:
        real = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
        return np.where(real, np.sin(0.9 * batch.tokens), 0.0).sum(axis=1).astype(np.float32)

    def vectors(self, batch: MicroBatch) -> Array:
        return np.stack([np.sin((place + 1) * self.scores(batch)) for place in range(5)], axis=1)

    def sample(
        self, prompts: Sequence[Array], chances: Array, settings: GenerationSettings, adapter: bool = True
    ) -> list[Array]:
        """Answers of one token to six, by the numbers alone."""
        lengths = 1 + (chances[:, 0] * 6).astype(int)
        return [
            (3 + 200 * row[:length]).astype(np.int32) for row, length in zip(chances, lengths, strict=True)
        ]


class Halves:
    """Earns the share of an answer's tokens that are even."""

    name = "halves"

    def check(self, rows: Any) -> None:
        """Every row will do."""

    def earned(self, answers: Any) -> list[float]:
        return [float(np.mean([int(word) % 2 for word in answer.text.split()])) for answer in answers]


MODEL = Model()
NAMESPACES: dict[str, tuple[Any, Callable[[Any], Any], float]] = {
    "numpy": (NUMPY, np.asarray, 1e-12),
    "torch": (TORCH, lambda array: torch.from_numpy(np.asarray(array)), 2e-6),
    "mlx": (MLX, lambda array: mx.array(np.asarray(array)), 2e-6),
}


class Step:
    """A session that optimizes nothing: it tells the totals of its steps."""

    backend, process, processes = "told", 0, 1
    scorer = sampler = MODEL

    def __init__(self, task: str, namespace: str) -> None:
        training = TrainingConfig(group_size=3, rewards=("format",), max_new_tokens=6, temperature=0.8)
        self.xp, self._array, self.tolerance = NAMESPACES[namespace]
        self.objective = objective_of(
            Config(base="tiny", task=task, data=DataConfig(train="rows.jsonl"), training=training)
        )
        self.state = StepState(self.objective, MODEL)

    def array(self, values: Any) -> Any:
        """An array of the namespace, float32 but on NumPy."""
        values = np.asarray(values)
        whole = values.dtype.kind != "f"
        return self._array(values if whole else values.astype("f8" if self.xp is NUMPY else "f4"))

    def outputs(self, batch: MicroBatch) -> Array:
        if self.objective.outputs == "scores":
            return MODEL.scores(batch)
        return MODEL.token_logps(batch, self.objective.temperature)

    def added(self, batch: MicroBatch, outputs: Any) -> float:
        """The sum of a batch's losses; its metrics are counted."""
        known = {name: self.array(values) for name, values in self.state.constants(batch).items()}
        scalars = {name: self.array(value) for name, value in self.state.scalars.items()}
        each, metrics = self.objective.losses(self.xp, outputs, known, scalars)
        assert np.asarray(each).shape == batch.counted.shape
        for name, (values, which) in metrics.items():
            counts = np.asarray(which) * batch.counted
            self.state.sums.add([name], np.array([[(np.asarray(values) * counts).sum(), counts.sum()]]))
        return float((np.asarray(each, dtype=np.float64) * batch.counted).sum())

    def train_step(self, batches: Sequence[MicroBatch], settings: StepSettings) -> StepResult:
        self.state.begin(batches)
        total = sum(self.added(batch, self.array(self.outputs(batch))) for batch in batches)
        total /= self.objective.divisor(settings.target_tokens, settings.examples)
        _, means = self.state.finish(training=True)
        return StepResult(total, 0.0, True, means)

    def evaluate(self, batches: Sequence[MicroBatch], adapter: bool = True) -> LossSum:
        raise AssertionError("a rollout asks nothing else of its session")


def references_of(rows: Rows) -> Array:
    known = np.zeros((len(rows), len(rows[0].sequences)))
    for places, batch in sequence_batches(rows, 4, PAD, 0, 1):
        known.reshape(-1)[places] = row_log_probabilities(MODEL, batch)
    return known


def batches_of(
    rows: Rows, references: Array | None, parts: Sequence[Sequence[int]], processes: int
) -> list[MicroBatch]:
    """The micro-batches of all processes."""
    return [
        batch
        for process in range(processes)
        for batch in micro_batches(
            rows, references, [np.array(part) for part in parts], (process, processes), PAD
        )
    ]


def steps(task: str, namespace: str, parts: Sequence[Sequence[int]], processes: int) -> Iterator[Any]:
    """What two steps on the same rows tell, and what is carried on."""
    kind = TASKS[task]
    rows = learned_rows(rows_of(kind.kind), kind.kind, 64, kind.needs_mismatched)
    references = references_of(rows) if kind.needs_reference else None
    step = Step(task, namespace)
    session: Any = step
    if kind.samples:
        generation = GenerationSettings(6, 0.8, (202,), 5)
        rules = Rules([Halves()], lambda ids: " ".join(map(str, ids)), 3, generation, PAD)
        session = RolloutSession(session, rules)
    targets = int(rows.facts.targets.sum())
    for number in (1, 2):
        result = session.train_step(
            batches_of(rows, references, parts, processes), StepSettings(number, 1e-3, targets, ROWS)
        )
        yield result.loss
        yield dict(result.means)
        yield step.objective.state()


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if not task.embeds])
def test_what_a_step_tells_does_not_depend_on_how_its_rows_are_split(
    task: str, split: str, namespace: str
) -> None:
    tolerance = NAMESPACES[namespace][2]
    together, found = (steps(task, namespace, *how) for how in ((TOGETHER, 1), SPLITS[split]))
    for one, other in zip(together, found, strict=True):
        assert other == pytest.approx(one, rel=tolerance, abs=tolerance)


def test_the_steps_that_are_split_tell_something_and_go_on() -> None:
    """What is compared above is neither nothing nor always the same."""
    told = {task: list(steps(task, "numpy", TOGETHER, 1)) for task in ("dpo", "kto", "bco", "grpo", "reward")}
    for task, (loss, means, _, later, _, _) in told.items():
        assert loss != 0.0
        assert means
        assert (loss == later) == (task in ("dpo", "kto", "reward")), (
            "rows are the same; shift and answers not"
        )
    assert told["kto"][1]["drift"] > 0.0
    loss, means = told["grpo"][:2]
    assert loss == pytest.approx(0.04 * means["kl"] - means["reward"])
    assert told["bco"][2]["count"] == ROWS
    assert told["bco"][5]["count"] == 2 * ROWS


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("processes", [2, 3, ROWS, ROWS + 3])
def test_an_embedding_step_is_the_same_on_any_number_of_processes(processes: int, namespace: str) -> None:
    """What an anchor is told from are the texts of its micro-batch on all processes."""

    def told(processes: int) -> tuple[float, Any, int]:
        step, rows, total = Step("embedding", namespace), rows_of("embedding"), 0.0
        step.state.begin([])
        for part in ([0, 1, 2, 3], [4, 5, 6, 7, 8]):
            batches = batches_of(rows, None, [part], processes)
            candidates = np.zeros((int(batches[0].constants["count"]), 5))
            for batch in batches:
                assert batch.beside is not None
                places = batch.constants["places"]
                candidates[places] = MODEL.vectors(batch.beside)[: len(places)]
            for batch in batches:
                total += step.added(batch, (step.array(MODEL.vectors(batch)), step.array(candidates)))
        examples, means = step.state.finish(training=True)
        return total, means, examples

    tolerance = NAMESPACES[namespace][2]
    (alone, means, examples), (loss, other, count) = told(1), told(processes)
    assert examples == count == ROWS
    assert loss == pytest.approx(alone, rel=tolerance)
    assert other == pytest.approx(means, rel=tolerance, abs=tolerance)
    assert means.keys() == {"accuracy", "positive_cosine", "negative_cosine"}
