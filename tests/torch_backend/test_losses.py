"""The losses of preference and reinforcement tasks, against plain formulas and exact arithmetic.

Group advantages and the embedding loss have no counterpart in TRL that can be called: they are held against the
papers' formulas in NumPy. The other losses are held against TRL in test_losses_trl.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from soup_xb.backends.torch.preference_losses import (
    Judged,
    Losses,
    Pair,
    bco,
    dpo,
    ipo,
    kto,
    kto_kl,
    log_odds,
    orpo,
    per_token,
    simpo,
)
from soup_xb.backends.torch.reward_losses import Completions, embedding, group_advantages, grpo, reward
from soup_xb.core.objectives.settings import (
    Bco,
    Dpo,
    Embedding,
    Grpo,
    Ipo,
    Kto,
    Orpo,
    Simpo,
)

DTYPES = (torch.float64, torch.float32)


def tensor(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def test_ktos_kl_carries_no_gradient_and_is_zero_without_pairs() -> None:
    policy = tensor(-3.0, -4.0).requires_grad_()
    assert not kto_kl(policy, tensor(-5.0, -5.0)).requires_grad
    assert kto_kl(tensor(), tensor()).item() == 0.0


def test_orpo_adds_the_likelihood_of_the_chosen_answer() -> None:
    policy = Pair(tensor(math.log(0.5)), tensor(math.log(0.2)))
    expected = math.log(2) - 0.1 * math.log(1 / (1 + (0.2 / 0.8)))
    assert orpo(policy, Orpo())[0].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves", "clipped"),
    [
        (1.5, 1.0, False, "clipped_high"),
        (1.5, -1.0, True, None),
        (0.5, 1.0, True, None),
        (0.5, -1.0, False, "clipped_low"),
        (1.1, 1.0, True, None),
        (0.9, -1.0, True, None),
    ],
)
def test_grpo_stops_pushing_a_token_that_went_far_enough(
    ratio: float, advantage: float, moves: bool, clipped: str | None
) -> None:
    old = tensor(-2.0).unsqueeze(0)
    policy = (old + math.log(ratio)).requires_grad_()
    completions = Completions(policy, old, old, torch.ones(1, 1, dtype=torch.bool))
    losses, metrics = grpo(completions, tensor(advantage), Grpo(beta=0.0))
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert gradient.item() == pytest.approx(-ratio * advantage if moves else 0.0)
    assert [name for name in ("clipped_low", "clipped_high") if metrics[name].item()] == [clipped] * bool(
        clipped
    )


def test_grpo_of_a_first_update_follows_the_advantages_and_returns_to_the_reference() -> None:
    policy = tensor(-2.0, -2.0).unsqueeze(-1).requires_grad_()
    trained = torch.ones(2, 1, dtype=torch.bool)
    on_policy = Completions(policy, policy, tensor(-2.0, -1.0).unsqueeze(-1), trained)
    losses, metrics = grpo(on_policy, tensor(1.0, 0.0), Grpo(beta=0.5))
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert gradient[0].item() == pytest.approx(-1.0)
    assert gradient[1].item() == pytest.approx(0.5 * (1 - math.e))
    torch.testing.assert_close(metrics["kl"], tensor(0.0, math.e - 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_grpo_stays_finite_however_far_a_token_went(dtype: torch.dtype) -> None:
    policy = tensor(-1e3, -1e-3, -1e3, -1e-3, dtype=dtype).unsqueeze(-1).requires_grad_()
    other = tensor(-1e-3, -1e3, -1e-3, -1e3, dtype=dtype).unsqueeze(-1)
    completions = Completions(policy, other, other, torch.ones(4, 1, dtype=torch.bool))
    losses, metrics = grpo(completions, tensor(1.0, -1.0, -1.0, 0.0, dtype=dtype), Grpo())
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.isfinite().all() and gradient.isfinite().all() and metrics["kl"].isfinite().all()


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_are_rewards_above_the_mean_of_their_group(scale: bool) -> None:
    rewards = noise((3, 4), torch.float64, 8)
    groups = rewards.numpy()
    expected = groups - groups.mean(axis=1, keepdims=True)
    if scale:
        expected = expected / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(
        group_advantages(rewards.requires_grad_(), scale).numpy(), expected, atol=1e-12
    )


@pytest.mark.parametrize("rewards", [[[2.5]], [[1.0, 1.0, 1.0]]])
def test_a_group_without_a_difference_has_no_advantages(rewards: list[list[float]]) -> None:
    assert not group_advantages(torch.tensor(rewards), scale=True).any()


@pytest.mark.parametrize("negatives", [0, 3])
def test_the_embedding_loss_is_the_papers_formula_on_cosines(dtype: torch.dtype, negatives: int) -> None:
    anchors, candidates = noise((4, 6), dtype, 9), noise((4 + negatives, 6), dtype, 10)
    rows, columns = (array.double().numpy() for array in (anchors, candidates))
    cosines = np.array([[a @ c / np.linalg.norm(a) / np.linalg.norm(c) for c in columns] for a in rows])
    chances = np.exp(20 * cosines) / np.exp(20 * cosines).sum(axis=1, keepdims=True)
    losses, metrics = embedding(anchors, candidates, Embedding())
    np.testing.assert_allclose(losses.numpy(), -np.log(np.diagonal(chances)), rtol=1e-6, atol=1e-6)
    assert metrics["accuracies"].tolist() == (cosines.argmax(axis=1) == np.arange(4)).astype(float).tolist()
    best_wrong = np.where(np.eye(*cosines.shape, dtype=bool), -np.inf, cosines).max(axis=1)
    np.testing.assert_allclose(metrics["margins"].numpy(), np.diagonal(cosines) - best_wrong, atol=1e-6)


def test_the_gradient_of_the_embedding_loss_is_that_of_finite_differences() -> None:
    inputs = [noise((n, 5), torch.float64, n).requires_grad_() for n in (3, 5)]
    assert torch.autograd.gradcheck(lambda *sides: embedding(*sides, Embedding())[0], inputs)


def test_an_anchor_alone_has_no_wrong_answer() -> None:
    losses, metrics = embedding(noise((1, 3), torch.float64, 1), noise((1, 3), torch.float64, 2), Embedding())
    assert losses.item() == 0.0
    assert metrics["margins"].isfinite().all()


@pytest.mark.parametrize("logp", [-1e3, -40.0, -0.7, -0.69, -0.01, -1e-5, -1e-12, -1e-15])
def test_odds_are_exact_for_every_probability(logp: float) -> None:
    with localcontext() as context:
        context.prec = 600
        p = Decimal(logp).exp()
        expected = float((p / (1 - p)).ln())
    assert log_odds(tensor(logp)).item() == pytest.approx(expected, abs=1e-12, rel=1e-14)


@pytest.mark.parametrize("logp", [0.0, -1e-9, -1e-7, -1e3])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_orpo_stays_finite_where_an_answer_is_certain_or_impossible(logp: float, side: str) -> None:
    sides = {"chosen": tensor(-1.0, dtype=torch.float32), "rejected": tensor(-1.0, dtype=torch.float32)}
    sides[side] = tensor(logp, dtype=torch.float32).requires_grad_()
    losses, _ = orpo(Pair(**sides), Orpo())
    (gradient,) = torch.autograd.grad(losses.sum(), sides[side])
    assert losses.isfinite().all() and gradient.isfinite().all()


PAIRED: dict[str, Callable[[Pair], Losses]] = {
    "dpo": lambda pair: dpo(pair, Pair(tensor(-20.0, -20.0, -9.0), tensor(-20.0, -20.0, -9.0)), Dpo()),
    "ipo": lambda pair: ipo(pair, Pair(tensor(-20.0, -20.0, -9.0), tensor(-20.0, -20.0, -9.0)), Ipo()),
    "orpo": lambda pair: orpo(pair, Orpo()),
    "simpo": lambda pair: simpo(pair, Simpo()),
    "reward": reward,
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
    assert metrics["accuracies"].tolist() == [1.0, 0.0, 0.0]
    assert metrics["margins"][2].item() == 0.0
    torch.testing.assert_close(metrics["margins"], metrics["chosen_rewards"] - metrics["rejected_rewards"])
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_of_equal_answers_dpo_is_the_logarithm_of_two(label_smoothing: float) -> None:
    pair = Pair(tensor(-9.0), tensor(-9.0))
    assert dpo(pair, pair, Dpo(label_smoothing=label_smoothing))[0].item() == pytest.approx(math.log(2))


def test_smoothed_labels_hold_a_margin_back() -> None:
    wide = tensor(50.0).requires_grad_()
    losses, _ = dpo(Pair(wide, tensor(0.0)), Pair(tensor(0.0), tensor(0.0)), Dpo(label_smoothing=0.1))
    assert torch.autograd.grad(losses.sum(), wide)[0].item() > 0


def test_the_rewards_of_pairs_are_scaled_log_ratios() -> None:
    policy, reference = Pair(tensor(-3.0), tensor(-5.0)), Pair(tensor(-4.0), tensor(-4.5))
    for loss, settings in ((dpo, Dpo(beta=0.2)), (ipo, Ipo(beta=0.2))):
        metrics = loss(policy, reference, settings)[1]
        assert metrics["chosen_rewards"].item() == pytest.approx(0.2)
        assert metrics["rejected_rewards"].item() == pytest.approx(-0.1)
    for metrics in (simpo(policy, Simpo(beta=3.0))[1], orpo(policy, Orpo(beta=3.0))[1]):
        assert metrics["chosen_rewards"].item() == pytest.approx(-9.0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda judged: kto(judged, torch.tensor(2.0), Kto(beta=0.5)),
        lambda judged: bco(judged, 1.0, Bco(beta=0.5)),
    ],
)
def test_judged_answers_move_to_the_side_of_their_verdict(loss: Callable[[Judged], Losses]) -> None:
    policy = tensor(-6.0, -6.0, -14.0, -14.0, -8.0).requires_grad_()
    reference = tensor(-10.0, -10.0, -10.0, -10.0, -10.0).requires_grad_()
    desirable = torch.tensor([True, False, True, False, True])
    losses, metrics = loss(Judged(policy, reference, desirable))
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert (gradient < 0).tolist() == desirable.tolist()
    torch.testing.assert_close(metrics["rewards"], tensor(2.0, 2.0, -2.0, -2.0, 1.0))
    assert metrics["accuracies"].tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert not any(value.requires_grad for value in metrics.values())


def test_no_gradient_reaches_the_reference() -> None:
    constant = tensor(-4.0).requires_grad_()
    policy, reference = tensor(-3.0).requires_grad_(), Pair(constant, constant)
    verdict = torch.tensor([True])
    tokens = Completions(policy[None], constant[None], constant[None], verdict[None])
    losses = [
        dpo(Pair(policy, policy), reference, Dpo())[0],
        ipo(Pair(policy, policy), reference, Ipo())[0],
        kto(Judged(policy, constant, verdict), constant.sum(), Kto())[0],
        bco(Judged(policy, constant, verdict), 0.0, Bco())[0],
        grpo(tokens, constant, Grpo())[0],
    ]
    torch.stack(losses).sum().backward()
    assert policy.grad is not None
    assert constant.grad is None


def test_an_answer_without_tokens_has_the_mean_zero() -> None:
    assert per_token(tensor(-6.0, 0.0), torch.tensor([3, 0])).tolist() == [-2.0, 0.0]
