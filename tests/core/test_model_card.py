from __future__ import annotations

import json
import re

import pytest
from attrs import evolve
from ruamel.yaml import YAML

from soup_xb.core.adapter.model_card import CardFacts, model_card
from soup_xb.core.adapter.readers import Misread
from soup_xb.core.run.report import ModuleRow

FACTS = CardFacts(
    base="org/base-1B",
    data="chats.jsonl",
    steps=1200,
    modules=[ModuleRow("self_attn.q_proj", 30, 8, 16, 2.0, 276_480)],
    saved_rank=24,
    misread=(),
    settings="base: org/base-1B\ntraining:\n  lr: 1e-4\n",
    version="0.1.0",
    train_loss=1.23456,
    eval_loss=1.5,
    tags=["pissa"],
)


def front_matter(card: str) -> dict[str, object]:
    _, text, _ = card.split("---\n", 2)
    return YAML(typ="safe").load(text)


def test_the_front_matter_is_what_a_hub_reads() -> None:
    assert front_matter(model_card(FACTS)) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "org/base-1B",
        "tags": ["lora", "peft", "soup-xb", "pissa"],
    }


def test_the_card_tells_data_losses_modules_settings_and_loading() -> None:
    card = model_card(FACTS)
    for expected in (
        "# LoRA adapter for `org/base-1B`",
        "Trained for 1,200 steps on `chats.jsonl` with soup-xb 0.1.0: final training loss 1.2346, "
        "evaluation loss 1.5000.",
        "| `self_attn.q_proj` | 30 | 8 | 16 | 2 | 276.5 K |",
        "```yaml\nbase: org/base-1B\ntraining:\n  lr: 1e-4\n```",
        "PeftModel.from_pretrained(base,",
        "vllm serve org/base-1B --enable-lora --max-lora-rank 32 --lora-modules",
        "soupx export PATH/TO/THIS/FOLDER --to mlx-lm --output mlx-adapter",
        "mlx_lm.generate --model org/base-1B --adapter-path mlx-adapter",
        "convert_lora_to_gguf.py --base BASE_FOLDER PATH/TO/THIS/FOLDER",
        "soupx merge PATH/TO/THIS/FOLDER --output merged",
    ):
        assert expected in card


@pytest.mark.parametrize("base", ["/home/me/models/tiny", "./models/tiny", "tiny", "../tiny"])
def test_a_local_base_is_named_by_its_folder_and_not_as_a_hub_id(base: str) -> None:
    card = model_card(evolve(FACTS, base=base, settings=""))
    assert "base_model" not in front_matter(card)
    assert "# LoRA adapter for `tiny`" in card
    assert "/home/me" not in card


def test_losses_that_do_not_exist_are_not_told() -> None:
    card = model_card(evolve(FACTS, train_loss=float("nan"), eval_loss=None))
    assert "with soup-xb 0.1.0.\n" in card
    assert "nan" not in card


def test_foreign_text_stays_in_its_place() -> None:
    card = model_card(
        evolve(
            FACTS,
            settings="system: '```\n# not a heading'",
            modules=[ModuleRow("a|b`\n# c", 1, 1, 1.0, 1.0, 1)],
            tags=["x\ny: z"],
        )
    )
    assert "````yaml\n" in card
    assert "| `a\\|b'# c` | 1 |" in card
    assert front_matter(card)["tags"][-1] == "x\ny: z"


def test_the_python_lines_are_python() -> None:
    blocks = re.findall(r"```python\n(.*?)\n```", model_card(evolve(FACTS, base='we"ird')), re.DOTALL)
    assert len(blocks) == 1
    for block in blocks:
        compile(block, "card", "exec")
    assert json.dumps("PATH/TO/BASE") in blocks[0]


def test_a_card_prints_no_command_that_its_program_refuses() -> None:
    refusing = Misread(("vLLM", "llama.cpp"), "they refuse DoRA's magnitudes")
    card = model_card(evolve(FACTS, misread=(refusing,)))
    assert "**Not for vLLM, llama.cpp: they refuse DoRA's magnitudes.**" in card
    assert "vllm serve" not in card
    assert "convert_lora_to_gguf" not in card
    assert "mlx_lm.generate" in card


def test_a_version_that_reads_it_keeps_its_command() -> None:
    older = Misread(("vLLM before 0.32",), "they read one rank")
    card = model_card(evolve(FACTS, misread=(older,)))
    assert "vllm serve" in card
    assert "Not for vLLM before 0.32" in card


def test_a_local_base_has_to_be_named_again_for_the_whole_model() -> None:
    assert "soupx merge PATH/TO/THIS/FOLDER --base PATH/TO/BASE" in model_card(
        evolve(FACTS, base="/home/me/tiny")
    )


def test_a_template_of_its_own_and_another_end_are_given_to_every_client() -> None:
    card = model_card(evolve(FACTS, new_template=True, other_end=True))
    folder = "PATH/TO/THIS/FOLDER"
    assert f'model.generation_config = GenerationConfig.from_pretrained("{folder}")' in card
    assert f"--chat-template {folder}/chat_template.jinja --generation-config {folder}" in card
    plain = model_card(FACTS)
    assert "GenerationConfig" not in plain and "--chat-template" not in plain
