"""The losses of preference and reinforcement tasks, with their gradients, against TRL's own code.

Dpo, ipo, kto, bco, orpo (of which TRL has the odds term), simpo, cpo, reward and grpo. TRL is an oracle of the tests
alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from torch import Tensor

from soup_xb.backends.torch.step import XP
from soup_xb.core.config.schema import Config, DataConfig, TrainingConfig
from soup_xb.core.objectives import losses as formulas
from soup_xb.core.objectives.objective import Objective
from soup_xb.core.rows.batches import collate
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import TokenSequence
from soup_xb.core.run.plan import objective_of
from soup_xb.core.tasks import TASKS

Oracle = Callable[..., Any]
DTYPES = (torch.float64, torch.float32)
# Sums of log-probabilities: ordinary ones, equal ones, and answers that are next to impossible.
CHOSEN = (-12.0, -35.5, -0.3, -20.0, -1e3, -4.0, -1e3, -7.25)
REJECTED = (-14.5, -30.25, -0.9, -20.0, -6.0, -1e3, -1e3, -3.5)


def tensor(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def sums(values: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probabilities of policy and reference; the fourth and the seventh are equal on both sides of a pair."""
    policy = tensor(*values, dtype=dtype)
    return policy, 0.9 * policy + noise((4,), dtype, 1).repeat(2)


def means(values: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    policy, reference = sums(values, dtype)
    return policy / 8, reference / 8


def per_token(summed: Tensor, tokens: Tensor) -> Tensor:
    return summed / tokens.clamp(min=1)


def settings_of(task: str, **training: float) -> SimpleNamespace:
    """What the task's loss takes out of a file's `training`."""
    values = TrainingConfig(**training)
    return SimpleNamespace(**{name: TASKS[task].setting(values, name) for name in TASKS[task].settings})


def objective(task: str, settings: SimpleNamespace) -> Objective:
    """The task's objective as a file makes it."""
    return objective_of(
        Config(
            base="tiny",
            task=task,
            data=DataConfig(train="rows.jsonl"),
            training=TrainingConfig(**vars(settings)),
        )
    )


def computed(task: str, settings: SimpleNamespace, *statistics: Any) -> Any:
    """The task's losses of what they are functions of."""
    return TASKS[task].loss(XP, *statistics, **vars(settings))


def compare(ours: Oracle, theirs: Oracle, *inputs: Tensor) -> None:
    """Both give the same loss for each example, and the same gradients of a weighted sum, which are finite."""
    found = []
    for function in (ours, theirs):
        leaves = [value.clone().requires_grad_() for value in inputs]
        losses = function(*leaves)
        weights = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)
        found.append((losses.detach(), torch.autograd.grad((losses * weights).sum(), leaves)))
    (losses, gradients), (expected, expected_gradients) = found
    assert losses.shape == expected.shape
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-6)


def two_words(tokens: Tensor) -> Tensor:
    """Logits (rows, length + 1, 2) over two words, of which the first has the given log-probabilities."""
    words = torch.stack([tokens, torch.log1p(-tokens.exp())], dim=-1)
    return torch.cat([words, words.new_zeros(len(tokens), 1, 2)], dim=1)


class Trl:
    """TRL's trainers without models and data: instances with the attributes that their losses read."""

    def __init__(self) -> None:
        from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments
        from trl.experimental.cpo.cpo_trainer import CPOTrainer
        from trl.experimental.kto.kto_trainer import KTOTrainer
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.grpo_trainer import GRPOTrainer
        from trl.trainer.reward_trainer import RewardTrainer

        self.kinds = {
            "dpo": DPOTrainer,
            "kto": KTOTrainer,
            "bco": BCOTrainer,
            "orpo": ORPOTrainer,
            "cpo": CPOTrainer,
            "reward": RewardTrainer,
            "grpo": GRPOTrainer,
        }
        self.moments = RunningMoments
        self.accelerator = SimpleNamespace(
            device=torch.device("cpu"),
            gather=torch.clone,
            gather_for_metrics=torch.clone,
            use_distributed=False,
        )

    def trainer(self, kind: str, **attributes: Any) -> Any:
        trainer = object.__new__(self.kinds[kind])
        trainer.__dict__ |= {
            "accelerator": self.accelerator,
            "model": SimpleNamespace(training=True),
            "_metrics": {"train": defaultdict(list)},
            "_total_train_tokens": 0,
            **attributes,
        }
        return trainer

    def dpo(self, kind: str, beta: float) -> Oracle:
        """Losses of tokens' log-probabilities (2n, length), chosen answers first, from DPOTrainer."""
        trainer = self.trainer(
            "dpo",
            beta=beta,
            label_smoothing=0.0,
            loss_types=[kind],
            loss_weights=[1.0],
            f_divergence_type="reverse_kl",
            ld_alpha=None,
            precompute_ref_logps=True,
            use_weighting=False,
        )

        def one(tokens: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
            logits = two_words(tokens)
            inputs = {
                "input_ids": torch.zeros(logits.shape[:2], dtype=torch.int64),
                "attention_mask": torch.ones(logits.shape[:2], dtype=torch.int64),
                "completion_mask": torch.nn.functional.pad(mask.long(), (1, 0)),
                "ref_chosen_logps": reference[:1],
                "ref_rejected_logps": reference[1:],
            }
            return trainer._compute_loss(lambda **_: SimpleNamespace(logits=logits), inputs, False)

        def losses(tokens: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
            count = len(tokens) // 2
            pairs = [torch.tensor([index, index + count]) for index in range(count)]
            return torch.stack([one(tokens[pair], mask[pair], reference[pair]) for pair in pairs])

        return losses

    def cpo(self, kind: str, settings: SimpleNamespace, together: bool) -> Oracle:
        """The loss of a whole batch from CPOTrainer, which adds the likelihood of the chosen answers.

        A function of tokens' log-probabilities (2n, length), chosen answers first, and of which count: one loss of a
        batch of all pairs, or of one batch for each pair.
        """
        trainer = self.trainer(
            "cpo",
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            simpo_gamma=getattr(settings, "simpo_gamma", 0.0),
            cpo_alpha=settings.cpo_alpha,
            loss_type=kind,
            alpha=0.0,
            is_encoder_decoder=False,
            aux_loss_enabled=False,
            pad_token_id=0,
        )

        def one(tokens: Tensor, mask: Tensor) -> Tensor:
            labels = torch.nn.functional.pad(torch.where(mask, 0, -100), (1, 0), value=-100)
            batch = {}
            for side, part in zip(("chosen", "rejected"), labels.chunk(2), strict=True):
                batch[f"{side}_input_ids"] = torch.zeros_like(part)
                batch[f"{side}_attention_mask"] = torch.ones_like(part)
                batch[f"{side}_labels"] = part
            logits = two_words(tokens)
            return trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)[0]

        def losses(tokens: Tensor, mask: Tensor) -> Tensor:
            count = len(tokens) // 2
            pairs = [torch.tensor([index, index + count]) for index in range(count)]
            batches = [torch.arange(2 * count)] if together else pairs
            return torch.stack([one(tokens[rows], mask[rows]) for rows in batches])

        return losses

    def judged(self, losses: Any, desirable: Tensor) -> Tensor:
        """TRL gives desirable answers first; back to the order of rows."""
        order = torch.cat([desirable.nonzero()[:, 0], (~desirable).nonzero()[:, 0]])
        return losses[order.argsort()]

    def rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        trainer = self.trainer("reward", args=SimpleNamespace(center_rewards_coefficient=None))
        found = []
        for scores in zip(chosen, rejected, strict=True):
            outputs = SimpleNamespace(logits=torch.stack(scores).unsqueeze(-1))
            inputs = {"attention_mask": torch.ones(2, 1)}
            found.append(trainer.compute_loss(lambda outputs=outputs, **_: outputs, inputs))
        return torch.stack(found)

    def grpo(
        self, answers: tuple[Tensor, ...], advantages: Tensor, epsilon: tuple[float, float], beta: float
    ) -> Tensor:
        trainer = self.trainer(
            "grpo",
            beta=beta,
            epsilon_low=epsilon[0],
            epsilon_high=epsilon[1],
            loss_type="grpo",
            importance_sampling_level="token",
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            current_gradient_accumulation_steps=1,
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        )
        found = []
        whole, old, reference, trained = answers
        for row in range(len(advantages)):
            policy = whole[row : row + 1]
            answer = (policy, torch.zeros_like(policy))
            trainer._get_per_token_logps_and_entropies = lambda *_, answer=answer, **__: answer
            inputs = {
                "prompt_ids": torch.zeros(1, 1),
                "prompt_mask": torch.ones(1, 1),
                "completion_ids": torch.zeros(policy.shape),
                "completion_mask": trained[row : row + 1].long(),
                "advantages": advantages[row : row + 1],
                "old_per_token_logps": old[row : row + 1],
                "ref_per_token_logps": reference[row : row + 1],
            }
            found.append(trainer._compute_loss(None, inputs))
        return torch.stack(found)


@pytest.fixture(scope="module")
def trl() -> Iterator[Trl]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        yield Trl()


def tokens_of(values: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n, 4) that sum to `values` over 1 to 4 trained tokens, and which those are."""
    counts = torch.arange(len(values)) % 4 + 1
    mask = torch.arange(4) < counts.unsqueeze(-1)
    return torch.where(mask, per_token(tensor(*values, dtype=dtype), counts).unsqueeze(-1), -1.0), mask


@pytest.mark.parametrize(
    ("kind", "task", "settings"),
    [
        ("sigmoid", "dpo", settings_of("dpo")),
        ("sigmoid", "dpo", settings_of("dpo", beta=0.7)),
        ("ipo", "ipo", settings_of("ipo")),
        ("ipo", "ipo", settings_of("ipo", beta=0.5)),
    ],
)
def test_losses_with_a_reference_are_those_of_trl(
    trl: Trl, dtype: torch.dtype, kind: str, task: str, settings: Any
) -> None:
    tokens, mask = (
        torch.cat(both) for both in zip(tokens_of(CHOSEN, dtype), tokens_of(REJECTED, dtype), strict=True)
    )
    reference = torch.cat([sums(CHOSEN, dtype)[1], sums(REJECTED, dtype)[1]])
    constants = {"weights": mask.to(dtype), "reference": reference}

    def losses(tokens: Tensor) -> Tensor:
        return objective(task, settings).losses(XP, tokens, constants, {})[0]

    oracle = trl.dpo(kind, settings.beta)
    compare(losses, lambda tokens: oracle(tokens, mask, reference), tokens)


def test_dpo_with_smoothed_labels_is_that_of_trl(trl: Trl, dtype: torch.dtype) -> None:
    """TRL's DPOTrainer has no smoothing; its CPO loss of log-ratios is the same formula."""
    settings = settings_of("dpo", beta=0.3, label_smoothing=0.2)
    trainer = trl.trainer("cpo", beta=0.3, label_smoothing=0.2, loss_type="sigmoid", alpha=0.0)
    (chosen, base), (rejected, other_base) = sums(CHOSEN, dtype), sums(REJECTED, dtype)
    compare(
        lambda *sides: computed("dpo", settings, *sides, base, other_base),
        lambda *sides: trainer.cpo_loss(sides[0] - base, sides[1] - other_base)[0],
        chosen,
        rejected,
    )


def drift_of(policy: Tensor, reference: Tensor) -> float:
    """kto's drift of mismatched answers of one token each."""
    one = TokenSequence([5, 6], [False, True], Source("rows.jsonl", 1))
    batch = collate([one] * len(policy), 0)
    batch = evolve(batch, beside=evolve(batch, constants={"reference": reference.double().numpy()}))
    scorer = SimpleNamespace(
        token_logps=lambda asked: policy[:, None].numpy() if asked is batch.beside else None,
        sum=lambda values: values,
    )
    drift: float = objective("kto", settings_of("kto")).before_step(scorer, [batch])["drift"]
    return drift


@pytest.mark.parametrize(
    "settings",
    [
        settings_of("kto"),
        settings_of("kto", beta=0.4, desirable_weight=1.3, undesirable_weight=0.6),
    ],
)
@pytest.mark.parametrize("drift", [2.5, -2.5])
def test_kto_is_that_of_trl(trl: Trl, dtype: torch.dtype, settings: Any, drift: float) -> None:
    reference = sums(CHOSEN, dtype)[1]
    desirable = torch.arange(8) % 3 != 1
    others = noise((5,), dtype, 3) - 30
    trainer = trl.trainer(
        "kto",
        beta=settings.beta,
        calculate_KL=True,
        loss_type="kto",
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
    )

    def oracle(policy: Tensor) -> Tensor:
        sides = [side for who in (policy, reference) for side in (who[desirable], who[~desirable])]
        losses, *_ = trainer.kto_loss(*sides[:2], others + drift, *sides[2:], others)
        return trl.judged(losses, desirable)

    kl = drift_of(others + drift, others)
    assert kl == pytest.approx(max(drift, 0.0), abs=1e-5)
    compare(
        lambda policy: computed("kto", settings, policy, reference, desirable, tensor(kl, dtype=dtype)[0]),
        oracle,
        sums(CHOSEN, dtype)[0],
    )


def test_bco_over_several_steps_is_that_of_trl(trl: Trl, dtype: torch.dtype) -> None:
    settings = settings_of("bco", beta=0.2)
    desirable = torch.arange(8) % 3 != 1
    trainer = trl.trainer(
        "bco", beta=settings.beta, embedding_func=None, running=trl.moments(trl.accelerator)
    )
    whole = objective("bco", settings)
    for seed in range(4):
        policy = noise((8,), dtype, seed) * 9 - 40
        reference = noise((8,), dtype, seed + 10) * 9 - 40
        # TRL counts a step's rewards before it computes the step's losses.
        constants = {
            "weights": torch.ones(8, 1, dtype=dtype),
            "reference": reference,
            "desirable": desirable,
        }
        scalars = {name: torch.tensor(value) for name, value in whole.before_step(trl, []).items()}
        _, metrics = whole.losses(XP, policy[:, None], constants, scalars)
        rewards, counted = metrics["reward"]
        whole.after_step({"reward": (rewards.sum().item(), counted.sum().item())})
        trainer.bco_loss(
            policy[desirable], policy[~desirable], reference[desirable], reference[~desirable], None, None
        )
        assert whole.state()["mean"] == pytest.approx(trainer.running.mean, abs=1e-6)
        assert whole.state()["count"] == round(trainer.running.count)

        def oracle(policy: Tensor, reference: Tensor = reference) -> Tensor:
            sides = [side for who in (policy, reference) for side in (who[desirable], who[~desirable])]
            return trl.judged(trainer.bco_loss(*sides, None, None, do_train=False)[0], desirable)

        def ours(policy: Tensor, reference: Tensor = reference) -> Tensor:
            return computed("bco", settings, policy, reference, desirable, trainer.running.mean)

        compare(ours, oracle, policy)


def test_orpos_odds_term_is_that_of_trl(trl: Trl) -> None:
    """In float32, to which TRL casts."""
    trainer = trl.trainer("orpo", beta=0.3)
    settings = settings_of("orpo", beta=0.3)

    def oracle(chosen: Tensor, rejected: Tensor) -> Tensor:
        return -chosen - trainer.odds_ratio_loss(chosen, rejected)[0]

    chosen, rejected = means(CHOSEN, torch.float32)[0], means(REJECTED, torch.float32)[0]
    compare(lambda *sides: computed("orpo", settings, *sides), oracle, chosen, rejected)


@pytest.mark.parametrize(
    "settings",
    [
        settings_of("simpo"),
        settings_of("simpo", beta=1.5, simpo_gamma=0.4, label_smoothing=0.1),
    ],
)
def test_simpo_is_that_of_trl(trl: Trl, dtype: torch.dtype, settings: Any) -> None:
    trainer = trl.trainer(
        "cpo",
        beta=settings.beta,
        simpo_gamma=settings.simpo_gamma,
        label_smoothing=settings.label_smoothing,
        loss_type="simpo",
        alpha=0.0,
    )
    chosen, rejected = means(CHOSEN, dtype)[0], means(REJECTED, dtype)[0]
    compare(
        lambda *sides: computed("simpo", settings, *sides),
        lambda *sides: trainer.cpo_loss(*sides)[0],
        chosen,
        rejected,
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_preference_of_cpo_is_that_of_trl(trl: Trl, dtype: torch.dtype, label_smoothing: float) -> None:
    settings = settings_of("cpo", beta=0.3, label_smoothing=label_smoothing, cpo_alpha=0.0)
    trainer = trl.trainer("cpo", beta=0.3, label_smoothing=label_smoothing, loss_type="sigmoid", alpha=0.0)
    compare(
        lambda chosen, rejected: computed("cpo", settings, chosen, rejected, chosen / 8),
        lambda *sides: trainer.cpo_loss(*sides)[0],
        sums(CHOSEN, dtype)[0],
        sums(REJECTED, dtype)[0],
    )


@pytest.mark.parametrize(
    ("kind", "task", "settings"),
    [
        ("sigmoid", "cpo", settings_of("cpo")),
        ("sigmoid", "cpo", settings_of("cpo", beta=0.3, label_smoothing=0.2, cpo_alpha=0.4)),
        ("sigmoid", "cpo", settings_of("cpo", cpo_alpha=0.0)),
        ("simpo", "simpo", settings_of("simpo", cpo_alpha=0.5)),
        (
            "simpo",
            "simpo",
            settings_of("simpo", beta=1.5, simpo_gamma=0.4, label_smoothing=0.1, cpo_alpha=1.0),
        ),
    ],
)
@pytest.mark.parametrize("together", [False, True], ids=["pair by pair", "answers of one length"])
def test_the_likelihood_beside_a_preference_is_that_of_trl(
    trl: Trl, dtype: torch.dtype, kind: str, task: str, settings: Any, together: bool
) -> None:
    """TRL averages over the tokens of a batch: the same if the batch is one pair or its answers are equally long."""
    sides = [tokens_of(values, dtype) for values in (CHOSEN, REJECTED)]
    if together:
        sides = [
            (tensor(*values, dtype=dtype)[:, None].expand(-1, 4) / 4, mask | True)
            for values, (_, mask) in zip((CHOSEN, REJECTED), sides, strict=True)
        ]
    tokens, mask = (torch.cat(both) for both in zip(*sides, strict=True))

    def losses(tokens: Tensor) -> Tensor:
        each = objective(task, settings).losses(XP, tokens, {"weights": mask.to(dtype)}, {})[0]
        return each.mean()[None] if together else each

    oracle = trl.cpo(kind, settings, together)
    compare(losses, lambda tokens: oracle(tokens, mask), tokens)


def test_the_reward_loss_is_that_of_trl(trl: Trl, dtype: torch.dtype) -> None:
    compare(
        lambda *scores: formulas.reward(XP, *scores),
        trl.rewards,
        tensor(1.5, -0.5, 3.0, 3.0, 1e3, -1e3, dtype=dtype),
        tensor(0.25, 2.0, -3.0, 3.0, -1e3, 1e3, dtype=dtype),
    )


ADVANTAGES = (1.5, -0.8, 0.0, 2.0, -2.0, 0.3)


def sampled(dtype: torch.dtype, policy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Six answers of up to five tokens whose ratios leave the clipped range on both sides; the third is empty."""
    old = noise((6, 5), dtype, 5) * 0.5 - 3
    trained = torch.arange(5) < torch.tensor([5, 3, 0, 1, 4, 5]).unsqueeze(-1)
    return policy, old, old + noise((6, 5), dtype, 6) * 0.4, trained.to(dtype)


@pytest.mark.parametrize(
    ("beta", "epsilon"),
    [(settings_of("grpo").beta, (0.2, 0.2)), (0.0, (0.2, 0.2)), (0.2, (0.1, 0.4))],
)
def test_grpo_is_that_of_trl(trl: Trl, dtype: torch.dtype, beta: float, epsilon: tuple[float, float]) -> None:
    advantages = tensor(*ADVANTAGES, dtype=dtype)
    policy = noise((6, 5), dtype, 5) * 0.5 - 3 + noise((6, 5), dtype, 7) * 0.4
    compare(
        lambda policy: formulas.grpo(XP, *sampled(dtype, policy), advantages, epsilon, beta=beta),
        lambda policy: trl.grpo(sampled(dtype, policy), advantages, epsilon, beta),
        policy,
    )


def test_the_range_of_a_token_s_ratio_is_that_of_trl_where_nothing_else_is_said() -> None:
    from trl import GRPOConfig

    defaults = GRPOConfig.__dataclass_fields__
    low, high = formulas.grpo.__defaults__[0]
    # TRL takes the lower end for the upper one too where that is left open.
    assert (low, high) == (defaults["epsilon"].default, defaults["epsilon_high"].default or low)
