"""Settings of preference losses keep their value under our name, whichever tool wrote them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from soup_xb.migrate import Migration

AXOLOTL = """
base_model: meta-llama/Llama-3.2-1B
adapter: lora
micro_batch_size: 2
num_epochs: 1
learning_rate: 5e-6
datasets:
  - path: ./pairs.jsonl
    type: chatml.intel
"""
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
finetuning_type: lora
dataset: dpo_en_demo
template: llama3
output_dir: saves/pairs
"""
SOUP = """
base: meta-llama/Llama-3.1-8B-Instruct
data:
  train: ./pairs.jsonl
  format: auto
"""


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        (
            AXOLOTL + "rl: dpo\nrl_beta: 0.3\ndpo_label_smoothing: 0.1\n",
            {"beta": 0.3, "label_smoothing": 0.1},
        ),
        (AXOLOTL + "rl: ipo\ntrl: {beta: 0.2}\nrl_beta: 0.3\n", {"beta": 0.2}),
        (AXOLOTL + "rl: orpo\norpo_alpha: 0.4\n", {"beta": 0.4}),
        (AXOLOTL + "rl: simpo\nrl_beta: 2.5\n", {"beta": 2.5, "simpo_gamma": 0.5}),
        (
            AXOLOTL + "rl: simpo\nrl_beta: 2.5\ncpo_alpha: 0.5\n",
            {"beta": 2.5, "simpo_gamma": 0.5, "cpo_alpha": 0.5},
        ),
        (
            AXOLOTL + "rl: kto\nkto_desirable_weight: 0.2\nkto_undesirable_weight: 1.5\n",
            {"desirable_weight": 0.2, "undesirable_weight": 1.5},
        ),
        (LLAMA_FACTORY + "stage: dpo\npref_beta: 0.3\npref_loss: ipo\n", {"beta": 0.3}),
        (
            LLAMA_FACTORY + "stage: dpo\npref_loss: simpo\nsimpo_gamma: 1.2\n",
            {"beta": 0.1, "simpo_gamma": 1.2},
        ),
        (
            LLAMA_FACTORY + "stage: kto\npref_beta: 0.2\nkto_chosen_weight: 2\nkto_rejected_weight: 3\n",
            {"beta": 0.2, "desirable_weight": 2.0, "undesirable_weight": 3.0},
        ),
        (SOUP + "task: dpo\ntraining: {dpo_beta: 0.2}\n", {"beta": 0.2}),
        (SOUP + "task: ipo\ntraining: {ipo_tau: 0.3}\n", {"beta": 0.3}),
        (
            SOUP + "task: preference\ntraining: {preference_loss: simpo, simpo_gamma: 0.7}\n",
            {"beta": 0.1, "simpo_gamma": 0.7},
        ),
    ],
)
def test_a_setting_of_the_loss_is_carried_over(
    accounted: Callable[..., Migration],
    values: Callable[[Migration], dict[str, Any]],
    text: str,
    ours: dict[str, float],
) -> None:
    names = ("beta", "simpo_gamma", "cpo_alpha", "label_smoothing", "desirable_weight", "undesirable_weight")
    written = values(accounted(text))
    assert {name: written[f"training.{name}"] for name in names if f"training.{name}" in written} == ours


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        (AXOLOTL + "rl: dpo\nsimpo_gamma: 1\n", "simpo_gamma", "it belongs to the loss of simpo"),
        (AXOLOTL + "rl: dpo\ncpo_alpha: 1\n", "cpo_alpha", "it belongs to the loss of simpo or cpo"),
        (AXOLOTL + "rl: dpo\nrpo_alpha: 1\n", "rpo_alpha", "no second term for the chosen answer's tokens"),
        (AXOLOTL + "rl: dpo\n", "datasets[0].type", "`prompt`, `chosen`, `rejected`"),
        (LLAMA_FACTORY + "stage: dpo\npref_ftx: 0.1\n", "pref_ftx", "no second term"),
        (LLAMA_FACTORY + "stage: dpo\nref_model: other\n", "ref_model", "the reference is the base itself"),
        (LLAMA_FACTORY + "stage: sft\npref_beta: 0.1\n", "pref_beta", "nothing here reads such a setting"),
        (SOUP + "task: dpo\ntraining: {kto_beta: 0.1}\n", "training.kto_beta", "nothing here reads"),
    ],
)
def test_what_does_not_count_for_the_loss_is_left_with_a_true_reason(
    accounted: Callable[..., Migration], text: str, key: str, reason: str
) -> None:
    (left,) = (left for left in accounted(text).left if left.key == key)
    assert reason in left.reason
