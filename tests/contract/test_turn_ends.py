"""A base whose eos is not what the chat template ends turns with: whoever opens what a run wrote stops there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASKED = [{"role": "user", "content": "What is 3?"}]
# The ids of <|endoftext|> and <|im_end|>.
ENDS = [0, 2]


@pytest.fixture
def base(save_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A Llama whose files name <|endoftext|> alone. Its rope is what mlx-lm takes where a config tells none."""
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=0, pad_token_id=0,
        rope_parameters={"rope_theta": 10_000.0},
    )  # fmt: skip
    folder = save_model(tmp_path / "base", config)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": "<|endoftext|>"}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def answer_of(model: Any, folder: Path) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_every_client_stops_and_speaks_as_trained(
    backend: str, base: Path, tmp_path: Path, soupx: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx_lm
    from peft import PeftModel

    rows = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "ok"}]}
        for i in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "base": str(base),
        "data": {"train": "train.jsonl", "chat_template": TEMPLATE},
        "training": {"max_steps": 30, "lr": 3e-2, "lora": {"r": 8}},
        "output": "out",
    }
    monkeypatch.chdir(tmp_path)
    Path("soup.yaml").write_text(json.dumps(config))
    done = soupx("train", "--backend", backend)
    assert done.code == 0, done.err
    assert "turns end with `<|im_end|>`, which the base's own files do not name as an end" in done.err
    card = Path("out/adapter/README.md").read_text()
    assert "GenerationConfig.from_pretrained" in card and "/chat_template.jinja --generation-config" in card
    assert soupx("merge", "out", "--output", "merged", "--backend", backend).code == 0
    assert soupx("export", "out", "--to", "mlx-lm", "--output", "exported").code == 0

    for folder in (Path("out/adapter"), Path("merged"), Path("exported")):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == ENDS
        assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    model = transformers.AutoModelForCausalLM.from_pretrained("merged")
    assert answer_of(model, Path("merged")) == "ok<|im_end|>"
    tuned: Any = PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), "out/adapter"
    )
    tuned.generation_config = transformers.GenerationConfig.from_pretrained("out/adapter")
    assert answer_of(tuned, Path("out/adapter")) == "ok<|im_end|>"

    merged, tokenizer = mlx_lm.load("merged")
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)
    assert mlx_lm.generate(merged, tokenizer, prompt, max_tokens=30) == "ok"
    monkeypatch.chdir("exported")
    [code] = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("…", ASKED[0]["content"]), names)
    assert mlx_lm.generate(names["model"], names["tokenizer"], names["prompt"], max_tokens=30) == "ok"


def test_an_export_without_another_template_shows_the_command(tmp_path: Path) -> None:
    from soup_xb.core.adapter.mlx_lm_file import tokenizer_readme

    text = tokenizer_readme(
        'mlx_lm.load("org/base", adapter_path=".")', "org/base", (0, 2), new_template=False
    )
    assert "mlx_lm.generate --model org/base --adapter-path . --extra-eos-token 0 2 --prompt" in text
