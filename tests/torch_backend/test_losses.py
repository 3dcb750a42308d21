"""The losses of preference and reinforcement tasks on torch, against plain formulas and exact arithmetic.

Group advantages and the embedding loss have no counterpart in TRL that can be called: they are held against the
papers' formulas in NumPy. The other losses are held against TRL in test_losses_trl, and all of them on every array
namespace against float64 in contract/test_losses_contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal, localcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attrs import frozen
from torch import Tensor

from soup_xb.backends.torch.step import XP, Step
from soup_xb.core.config.schema import Config, DataConfig, TrainingConfig
from soup_xb.core.objectives import losses as formulas
from soup_xb.core.objectives.objective import Objective, StepState
from soup_xb.core.rows.batches import MicroBatch, collate_rows
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import Row, TokenSequence
from soup_xb.core.run.plan import objective_of
from soup_xb.core.run.session import StepSettings

Losses = tuple[Tensor, Mapping[str, Tensor]]
DTYPES = (torch.float64, torch.float32)


@frozen(eq=False)
class Pair:
    """A number for the chosen answer and one for the rejected answer of each example, both (n,)."""

    chosen: Tensor
    rejected: Tensor

    @property
    def rows(self) -> Tensor:
        """As the rows of a batch: chosen answers, then rejected ones."""
        return torch.cat([self.chosen, self.rejected])


@frozen(eq=False)
class Judged:
    """Log-probabilities of policy and reference, verdicts as bool, all (n,)."""

    policy: Tensor
    reference: Tensor
    desirable: Tensor


def objective(task: str, **training: Any) -> Objective:
    """The task's objective as a file makes it."""
    return objective_of(
        Config(
            base="tiny", task=task, data=DataConfig(train="rows.jsonl"), training=TrainingConfig(**training)
        )
    )


def found(objective: Objective, outputs: Any, constants: dict[str, Any], **scalars: Any) -> Losses:
    each, metrics = objective.losses(XP, outputs, constants, scalars)
    return each, {name: values for name, (values, _) in metrics.items()}


def paired(task: str, policy: Pair, reference: Pair | None = None, **training: Any) -> Losses:
    """The losses and metrics of answers of one token each: their sum is their mean."""
    rows = policy.rows
    constants = {"weights": torch.ones(len(rows), 1, dtype=rows.dtype)}
    if reference is not None:
        constants["reference"] = reference.rows
    return found(objective(task, **training), rows[:, None], constants)


def scored(scores: Pair) -> Losses:
    return found(objective("reward"), scores.rows, {})


def judged(task: str, answers: Judged, training: dict[str, Any], **scalars: float) -> Losses:
    """The losses and metrics of answers of one token each."""
    constants = {
        "weights": torch.ones(len(answers.policy), 1, dtype=answers.policy.dtype),
        "reference": answers.reference,
        "desirable": answers.desirable,
    }
    known = {name: torch.tensor(value, dtype=answers.policy.dtype) for name, value in scalars.items()}
    return found(objective(task, **training), answers.policy[:, None], constants, **known)


def grpo(policy: Tensor, old: Tensor, reference: Tensor, advantages: Tensor, **settings: Any) -> Tensor:
    """The losses of answers that are trained on every token."""
    each: Tensor = formulas.grpo(XP, policy, old, reference, torch.ones_like(policy), advantages, **settings)
    return each


def tensor(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class Told:
    """A scorer that knows one log-probability of each row of a batch."""

    def __init__(self, *batches: tuple[MicroBatch, list[float]]) -> None:
        self._known = {id(batch): values for batch, values in batches}

    def token_logps(self, batch: MicroBatch, temperature: float = 1.0, adapter: bool = True) -> Any:
        assert temperature == 1.0
        assert adapter
        return np.array(self._known[id(batch)], dtype=np.float32)[:, None]

    def sum(self, values: Any) -> Any:
        return values


def judged_batch(references: list[list[float]]) -> MicroBatch:
    """Judged answers, every other one desirable, of one token each, with mismatched ones beside them."""
    one = TokenSequence([5, 6], [False, True], Source("rows.jsonl", 1))
    rows = [Row("judged", (one, one), extra=index % 2 == 0) for index in range(len(references))]
    return collate_rows(rows, np.array(references), 0)


def test_ktos_drift_is_a_number_that_no_gradient_passes_and_is_zero_without_rows() -> None:
    batch = judged_batch([[-3.0, -5.0], [-3.0, -5.0]])
    assert batch.beside is not None
    drift = objective("kto").before_step(Told((batch.beside, [-3.0, -4.0])), [batch])["drift"]
    assert type(drift) is float
    assert drift == pytest.approx(1.5)
    back = objective("kto").before_step(Told((batch.beside, [-6.0, -6.0])), [batch])
    assert back == {"drift": 0.0}
    assert objective("kto").before_step(Told(), []) == {"drift": 0.0}


def test_orpo_adds_the_likelihood_of_the_chosen_answer() -> None:
    policy = Pair(tensor(math.log(0.5)), tensor(math.log(0.2)))
    expected = math.log(2) - 0.1 * math.log(1 / (1 + (0.2 / 0.8)))
    assert paired("orpo", policy)[0].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("task", ["cpo", "simpo"])
def test_the_likelihood_beside_a_preference_is_each_chosen_answer_s_mean_whatever_its_length(
    task: str,
) -> None:
    """Of two pairs the chosen answers have one token and three; over all four tokens the mean would be 3.25."""
    logps = tensor(-1.0, 0.0, 0.0, -2.0, -4.0, -6.0, -3.0, 0.0, 0.0, -5.0, -5.0, -5.0).view(4, 3)
    constants = {"weights": (logps != 0).to(logps.dtype)}
    added, alone = (found(objective(task, cpo_alpha=alpha), logps, constants)[0] for alpha in (0.5, 0.0))
    assert (added - alone).tolist() == pytest.approx([0.5, 2.0])


def test_cpo_has_a_likelihood_where_nothing_is_said_and_simpo_has_none() -> None:
    policy = Pair(tensor(-2.0), tensor(-5.0))
    for task, alpha in (("cpo", 1.0), ("simpo", 0.0)):
        assert paired(task, policy)[0].equal(paired(task, policy, cpo_alpha=alpha)[0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [
        (1.5, 1.0, False),
        (1.5, -1.0, True),
        (0.5, 1.0, True),
        (0.5, -1.0, False),
        (1.1, 1.0, True),
        (0.9, -1.0, True),
    ],
)
def test_grpo_stops_pushing_a_token_that_went_far_enough(ratio: float, advantage: float, moves: bool) -> None:
    old = tensor(-2.0).unsqueeze(0)
    policy = (old + math.log(ratio)).requires_grad_()
    losses = grpo(policy, old, old, tensor(advantage), beta=0.0)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert gradient.item() == pytest.approx(-ratio * advantage if moves else 0.0)


def test_grpo_of_a_first_update_follows_the_advantages_and_returns_to_the_reference() -> None:
    policy = tensor(-2.0, -2.0).unsqueeze(-1).requires_grad_()
    reference = tensor(-2.0, -1.0).unsqueeze(-1)
    losses = grpo(policy, policy.detach(), reference, tensor(1.0, 0.0), beta=0.5)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert gradient[0].item() == pytest.approx(-1.0)
    assert gradient[1].item() == pytest.approx(0.5 * (1 - math.e))
    torch.testing.assert_close(
        formulas.divergence(XP, policy.detach(), reference)[:, 0], tensor(0.0, math.e - 2)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_grpo_stays_finite_however_far_a_token_went(dtype: torch.dtype) -> None:
    policy = tensor(-1e3, -1e-3, -1e3, -1e-3, dtype=dtype).unsqueeze(-1).requires_grad_()
    other = tensor(-1e-3, -1e3, -1e-3, -1e3, dtype=dtype).unsqueeze(-1)
    losses = grpo(policy, other, other, tensor(1.0, -1.0, -1.0, 0.0, dtype=dtype))
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    assert formulas.divergence(XP, policy, other).isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_group_tells_the_objective_and_has_the_gradient_of_the_surrogate(beta: float) -> None:
    """Each batch is used for one update: the policy that sampled is the one that is trained, and a constant."""
    policy = (noise((4, 3), torch.float64, 1) - 3).requires_grad_()
    weights = (torch.arange(3) < torch.tensor([3, 1, 2, 3]).unsqueeze(-1)).double()
    advantages, rewards = tensor(1.0, -0.5, 0.25, 0.0), tensor(2.0, 1.0, 0.0, 0.5)
    constants = {"weights": weights, "advantages": advantages, "rewards": rewards}
    reference = noise((4, 3), torch.float64, 2) - 3
    losses, metrics = found(
        objective("grpo", rewards=("format",), beta=beta),
        policy,
        {**constants, **({"reference": reference} if beta else {})},
    )
    kl = formulas.row_means(XP, formulas.divergence(XP, policy.detach(), reference), weights)
    torch.testing.assert_close(losses.detach(), beta * kl - rewards)
    assert metrics.keys() == ({"kl"} if beta else set())
    surrogate = formulas.grpo(XP, policy, policy.detach(), reference, weights, advantages, beta=beta)
    torch.testing.assert_close(
        torch.autograd.grad(losses.sum(), policy), torch.autograd.grad(surrogate.sum(), policy)
    )


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_are_rewards_above_the_mean_of_their_group(scale: bool) -> None:
    groups = noise((3, 4), torch.float64, 8).numpy()
    expected = groups - groups.mean(axis=1, keepdims=True)
    if scale:
        expected = expected / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    for xp, rewards in ((np, groups.reshape(-1)), (XP, torch.from_numpy(groups.reshape(-1)))):
        advantages = formulas.group_advantages(xp, rewards, 4, scale)
        np.testing.assert_allclose(np.asarray(advantages), expected.reshape(-1), atol=1e-12)


@pytest.mark.parametrize("rewards", [[[2.5]], [[1.0, 1.0, 1.0]]])
def test_a_group_without_a_difference_has_no_advantages(rewards: list[list[float]]) -> None:
    assert not formulas.group_advantages(np, np.array(rewards[0]), len(rewards[0]), True).any()


def embedding(anchors: Tensor, candidates: Tensor) -> Losses:
    """Each anchor belongs to the candidate of its place."""
    constants = {
        "right": torch.arange(len(anchors)),
        "compared": torch.full((len(anchors),), float(len(candidates) > 1), dtype=anchors.dtype),
    }
    each, metrics = objective("embedding").losses(XP, (anchors, candidates), constants, {})
    return each, {name: values for name, (values, _) in metrics.items()}


@pytest.mark.parametrize("negatives", [0, 3])
def test_the_embedding_loss_is_the_papers_formula_on_cosines(dtype: torch.dtype, negatives: int) -> None:
    anchors, candidates = noise((4, 6), dtype, 9), noise((4 + negatives, 6), dtype, 10)
    rows, columns = (array.double().numpy() for array in (anchors, candidates))
    cosines = np.array([[a @ c / np.linalg.norm(a) / np.linalg.norm(c) for c in columns] for a in rows])
    chances = np.exp(20 * cosines) / np.exp(20 * cosines).sum(axis=1, keepdims=True)
    losses, metrics = embedding(anchors, candidates)
    np.testing.assert_allclose(losses.numpy(), -np.log(np.diagonal(chances)), rtol=1e-6, atol=1e-6)
    assert metrics["accuracy"].tolist() == (cosines.argmax(axis=1) == np.arange(4)).astype(float).tolist()
    wrong = np.where(np.eye(*cosines.shape, dtype=bool), 0.0, cosines).sum(axis=1) / (3 + negatives)
    np.testing.assert_allclose(metrics["positive_cosine"].numpy(), np.diagonal(cosines), atol=1e-6)
    np.testing.assert_allclose(metrics["negative_cosine"].numpy(), wrong, atol=1e-6)


def test_the_gradient_of_the_embedding_loss_is_that_of_finite_differences() -> None:
    inputs = [noise((n, 5), torch.float64, n).requires_grad_() for n in (3, 5)]
    assert torch.autograd.gradcheck(lambda *sides: embedding(*sides)[0], inputs)


def test_an_anchor_alone_has_no_wrong_answer() -> None:
    losses, metrics = embedding(noise((1, 3), torch.float64, 1), noise((1, 3), torch.float64, 2))
    assert losses.item() == 0.0
    assert all(values.isfinite() for values in metrics.values())


def test_a_candidate_that_is_as_near_as_the_right_one_is_not_told_from_it() -> None:
    anchors = tensor(1.0, 0.0)[None]
    for other, expected in ((tensor(1.0, 0.0), 0.0), (tensor(0.0, 1.0), 1.0)):
        assert embedding(anchors, torch.stack([anchors[0], other]))[1]["accuracy"].tolist() == [expected]


@pytest.mark.parametrize("logp", [-1e3, -40.0, -0.7, -0.69, -0.01, -1e-5, -2e-7, -1e-12, -1e-15])
def test_odds_are_exact_for_every_probability(logp: float) -> None:
    """One that float32 would round to 1 counts as the largest float32 below 1, in any precision."""
    with localcontext() as context:
        context.prec = 600
        p = Decimal(min(logp, -(2.0**-23))).exp()
        expected = float((p / (1 - p)).ln())
    # Those of one half are even.
    odds = formulas.odds_margin(XP, tensor(logp), tensor(math.log(0.5)))
    assert odds.item() == pytest.approx(expected, abs=1e-12, rel=1e-14)


@pytest.mark.parametrize("logp", [0.0, -1e-9, -1e-7, -1e3])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_orpo_stays_finite_where_an_answer_is_certain_or_impossible(logp: float, side: str) -> None:
    sides = {"chosen": tensor(-1.0, dtype=torch.float32), "rejected": tensor(-1.0, dtype=torch.float32)}
    sides[side] = tensor(logp, dtype=torch.float32).requires_grad_()
    losses, _ = paired("orpo", Pair(**sides))
    (gradient,) = torch.autograd.grad(losses.sum(), sides[side])
    assert losses.isfinite().all() and gradient.isfinite().all()


EQUAL = Pair(tensor(-20.0, -20.0, -9.0), tensor(-20.0, -20.0, -9.0))
PAIRED: dict[str, Callable[[Pair], Losses]] = {
    "dpo": lambda pair: paired("dpo", pair, EQUAL),
    "ipo": lambda pair: paired("ipo", pair, EQUAL),
    "orpo": lambda pair: paired("orpo", pair),
    "simpo": lambda pair: paired("simpo", pair),
    "cpo": lambda pair: paired("cpo", pair),
    "reward": scored,
}


@pytest.mark.parametrize("loss", PAIRED.values(), ids=PAIRED)
def test_a_step_down_the_gradient_of_a_pair_raises_the_chosen_answer_above_the_rejected(
    loss: Callable[[Pair], Losses],
) -> None:
    chosen = tensor(-0.5, -2.0, -1.0).requires_grad_()
    rejected = tensor(-2.0, -0.5, -1.0).requires_grad_()
    losses, metrics = loss(Pair(chosen, rejected))
    up, down = torch.autograd.grad(losses.sum(), (chosen, rejected))
    assert (up < 0).all() and (down > 0).all()
    assert metrics["reward_accuracy"].tolist() == [1.0, 0.0, 0.0]
    assert metrics["reward_margin"][2].item() == 0.0
    torch.testing.assert_close(
        metrics["reward_margin"], metrics["reward_chosen"] - metrics["reward_rejected"]
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_of_equal_answers_dpo_is_the_logarithm_of_two(label_smoothing: float) -> None:
    pair = Pair(tensor(-9.0), tensor(-9.0))
    losses, _ = paired("dpo", pair, pair, label_smoothing=label_smoothing)
    assert losses.item() == pytest.approx(math.log(2))


def test_smoothed_labels_hold_a_margin_back() -> None:
    wide = tensor(50.0).requires_grad_()
    even = Pair(tensor(0.0), tensor(0.0))
    losses, _ = paired("dpo", Pair(wide, tensor(0.0)), even, label_smoothing=0.1)
    assert torch.autograd.grad(losses.sum(), wide)[0].item() > 0


def test_the_rewards_of_pairs_are_scaled_log_ratios() -> None:
    policy, reference = Pair(tensor(-3.0), tensor(-5.0)), Pair(tensor(-4.0), tensor(-4.5))
    for task in ("dpo", "ipo"):
        metrics = paired(task, policy, reference, beta=0.2)[1]
        assert metrics["reward_chosen"].item() == pytest.approx(0.2)
        assert metrics["reward_rejected"].item() == pytest.approx(-0.1)
    for task in ("simpo", "orpo", "cpo"):
        assert paired(task, policy, beta=3.0)[1]["reward_chosen"].item() == pytest.approx(-9.0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda answers: judged("kto", answers, {"beta": 0.5}, drift=2.0),
        lambda answers: judged("bco", answers, {"beta": 0.5}, shift=1.0),
    ],
)
def test_judged_answers_move_to_the_side_of_their_verdict(loss: Callable[[Judged], Losses]) -> None:
    policy = tensor(-6.0, -6.0, -14.0, -14.0, -8.0).requires_grad_()
    reference = tensor(-10.0, -10.0, -10.0, -10.0, -10.0)
    desirable = torch.tensor([True, False, True, False, True])
    losses, metrics = loss(Judged(policy, reference, desirable))
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert (gradient < 0).tolist() == desirable.tolist()
    torch.testing.assert_close(metrics["reward"], tensor(2.0, 2.0, -2.0, -2.0, 1.0))
    assert metrics["reward_accuracy"].tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_constants_and_metrics_of_a_step_carry_no_gradient() -> None:
    """What the objective knows beside the outputs is plain numbers, and what it tells becomes plain numbers."""
    batch = judged_batch([[-4.0, -4.0], [-5.0, -4.0], [-3.0, -4.0]])
    batch.counted[2] = 0.0
    assert batch.beside is not None
    base = SimpleNamespace(
        processes=SimpleNamespace(process=0, sum_=lambda tensors: None), place=torch.device("cpu")
    )
    adapters = SimpleNamespace(train=lambda on: None)
    for task in ("kto", "bco"):
        logps = torch.tensor([[-3.0], [-3.5], [7.0]], requires_grad=True)
        optimizer: Any = SimpleNamespace(
            zero_grad=lambda: None, gradients=list, step=lambda rate, logps=logps: (logps.grad.norm(), True)
        )
        state = StepState(objective(task), Told((batch.beside, [-3.0, -3.0, -3.0])))
        outputs: Any = SimpleNamespace(base=base, compute=lambda batch, logps=logps: logps)
        result = Step(state, outputs, None, 0).train(
            [batch], StepSettings(1, 1e-3, 3, 2), adapters, optimizer
        )
        # What does not count has neither a gradient nor a part in the metrics.
        assert logps.grad is not None
        assert (logps.grad[:, 0] != 0).tolist() == [True, True, False]
        assert result.means["reward_chosen"] == pytest.approx(0.1)
        assert result.means["reward_rejected"] == pytest.approx(0.15)
        assert all(type(mean) is float for mean in result.means.values())


@pytest.mark.parametrize("task", ["dpo", "ipo", "orpo", "simpo", "cpo"])
def test_rewards_are_sums_over_an_answer_or_means_as_the_loss_takes_them(task: str) -> None:
    """The chosen answer has two tokens, the rejected one three."""
    logps = tensor(-1.0, -2.0, -9.0, -3.0, -3.0, -3.0).view(2, 3)
    constants = {"weights": tensor(1.0, 1.0, 0.0, 1.0, 1.0, 1.0).view(2, 3), "reference": tensor(-2.0, -6.0)}
    _, metrics = found(objective(task, beta=0.5), logps, constants)
    expected = {"dpo": (-0.5, -1.5), "ipo": (-0.25, -0.5), "cpo": (-1.5, -4.5)}.get(task, (-0.75, -1.5))
    assert (metrics["reward_chosen"].item(), metrics["reward_rejected"].item()) == pytest.approx(expected)


def test_an_answer_without_tokens_has_the_mean_zero() -> None:
    logps, weights = torch.full((2, 3), -2.0), torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert formulas.row_means(XP, logps, weights).tolist() == [-2.0, 0.0]


def test_a_place_that_fills_a_row_counts_for_nothing_whatever_stands_there() -> None:
    logps = torch.tensor([[-1.0, math.inf], [-2.0, math.nan]]).requires_grad_()
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert formulas.row_sums(XP, logps, weights).tolist() == [-1.0, -2.0]
    assert formulas.cross_entropy(XP, logps, weights).tolist() == [1.0, 2.0]
