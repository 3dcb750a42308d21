"""A key that is read by nothing cannot hide: another value of each key changes what a run leaves, says or refuses."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soup_xb.core.config.schema import KEYS
from soup_xb.core.errors import SoupError
from soup_xb.core.run.events import Event, Notice

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"

PAIRS = {"data.train": "pairs.jsonl"}
TEXTS = {"task": "embedding", "data.train": "texts.jsonl"}
OTHER_COLUMN = {"data.train": "columns.jsonl"}
# Few and short answers; a reward that sets them apart.
ROLLOUTS = {
    "task": "grpo",
    "data.train": "prompts.jsonl",
    "data.val_split": 0.0,
    "training.rewards": "rewards.py:vowels",
    "training.group_size": 2,
    "training.max_new_tokens": 4,
    "training.max_steps": 2,
}
MATCHED = ROLLOUTS | {"training.rewards": ["rewards.py:vowels", "format"]}

# Another value for each key. A dict is a set of keys written together, where one alone would be refused as meaningless.
OTHERS: dict[str, Any] = {
    "base": "other-base",
    "task": "dpo",
    "backend": "auto",
    "adapter": "first/adapter",
    "output": "elsewhere",
    "data.train": "other.jsonl",
    "data.eval": {"data.eval": "other.jsonl", "data.val_split": 0.0},
    "data.format": "sharegpt",
    "data.columns": OTHER_COLUMN | {"data.columns": {"messages": "talk"}},
    "data.split": "test",
    "data.subset": "small",
    "data.streaming": True,
    "data.val_split": 0.3,
    "data.max_length": 40,
    "data.packing": True,
    "data.chat_template": TEMPLATE,
    "training.epochs": {"training.epochs": 1, "training.max_steps": None},
    "training.max_steps": 5,
    "training.lr": 1e-3,
    "training.batch_size": 3,
    "training.gradient_accumulation_steps": 2,
    "training.scheduler": "constant",
    "training.warmup_ratio": 0.5,
    "training.warmup_steps": 2,
    "training.weight_decay": 0.5,
    "training.max_grad_norm": 0.01,
    "training.optimizer": "sgd",
    "training.adam_beta1": 0.5,
    "training.adam_beta2": 0.5,
    "training.adam_epsilon": 1e-2,
    "training.seed": 7,
    "training.precision": "bf16",
    "training.quantization": "8bit",
    "training.sharding": "fsdp",
    "training.cpu_offload": {"training.sharding": "fsdp", "training.cpu_offload": True},
    "training.eval_steps": 1,
    "training.save_steps": 1,
    "training.save_total_limit": 1,
    "training.logging_steps": 2,
    "training.relora_steps": 2,
    "training.relora_warmup_ratio": {"training.relora_steps": 1, "training.relora_warmup_ratio": 0.6},
    "training.relora_prune_ratio": {"training.relora_steps": 2, "training.relora_prune_ratio": 0.3},
    "training.relora_reset_optimizer": {"training.relora_steps": 2, "training.relora_reset_optimizer": False},
    "training.relora_mode": {"training.relora_steps": 2, "training.relora_mode": "merge"},
    "training.relora_rewarm_steps": {
        "training.relora_steps": 3,
        "training.relora_mode": "merge",
        "training.relora_rewarm_steps": 2,
    },
    "training.rope_scaling.type": {"training.rope_scaling.type": "linear", "training.rope_scaling.factor": 2},
    "training.rope_scaling.factor": {
        "training.rope_scaling.type": "linear",
        "training.rope_scaling.factor": 4,
    },
    "training.rope_scaling.original_max_position_embeddings": {
        "training.rope_scaling.type": "yarn",
        "training.rope_scaling.factor": 2,
        "training.rope_scaling.original_max_position_embeddings": 32,
    },
    "training.beta": PAIRS | {"task": "dpo", "training.beta": 0.7},
    "training.label_smoothing": PAIRS | {"task": "dpo", "training.label_smoothing": 0.2},
    "training.simpo_gamma": PAIRS | {"task": "simpo", "training.simpo_gamma": 0.3},
    "training.cpo_alpha": PAIRS | {"task": "cpo", "training.cpo_alpha": 0.3},
    "training.desirable_weight": PAIRS | {"task": "kto", "training.desirable_weight": 0.4},
    "training.undesirable_weight": PAIRS | {"task": "kto", "training.undesirable_weight": 0.4},
    "data.train_on": "all",
    "data.query_prompt": TEXTS | {"data.query_prompt": "query: "},
    "data.document_prompt": TEXTS | {"data.document_prompt": "text: "},
    "training.pooling": TEXTS | {"training.pooling": "mean"},
    "training.embedding_scale": TEXTS | {"training.embedding_scale": 5.0},
    "training.router_aux_loss_coef": 0.1,
    "training.rewards": ROLLOUTS | {"training.rewards": "rewards.py:length"},
    "training.reward_model": ROLLOUTS | {"task": "rlhf", "training.reward_model": "judge"},
    "training.answer_pattern": MATCHED | {"training.answer_pattern": "[a-m]"},
    "training.group_size": ROLLOUTS | {"training.group_size": 3},
    "training.max_new_tokens": ROLLOUTS | {"training.max_new_tokens": 5},
    "training.temperature": ROLLOUTS | {"training.temperature": 0.5},
    "training.scale_rewards": ROLLOUTS | {"training.scale_rewards": False},
    "training.lora.r": 3,
    "training.lora.alpha": 5,
    "training.lora.dropout": 0.4,
    "training.lora.target_modules": "q_proj",
    "training.lora.init_strategy": "pissa",
    "training.lora.rank_pattern": {"q_proj": 2},
    "training.lora.alpha_pattern": {"q_proj": 2},
    "training.lora.use_rslora": True,
    "training.lora.use_dora": True,
    "training.lora.use_vera": True,
    "training.lora.use_olora": True,
}
# What such a key is compared with: the run that has its companions and not the key itself.
BESIDE = {
    "data.columns": OTHER_COLUMN,
    "training.rope_scaling.factor": {
        "training.rope_scaling.type": "linear",
        "training.rope_scaling.factor": 2,
    },
    "training.rope_scaling.original_max_position_embeddings": {
        "training.rope_scaling.type": "yarn",
        "training.rope_scaling.factor": 2,
    },
    "training.cpu_offload": {"training.sharding": "fsdp"},
    "training.relora_warmup_ratio": {"training.relora_steps": 1},
    "training.relora_prune_ratio": {"training.relora_steps": 2},
    "training.relora_reset_optimizer": {"training.relora_steps": 2},
    "training.relora_mode": {"training.relora_steps": 2},
    "training.relora_rewarm_steps": {"training.relora_steps": 3, "training.relora_mode": "merge"},
    "training.beta": PAIRS | {"task": "dpo"},
    "training.label_smoothing": PAIRS | {"task": "dpo"},
    "training.simpo_gamma": PAIRS | {"task": "simpo"},
    "training.cpo_alpha": PAIRS | {"task": "cpo"},
    "training.desirable_weight": PAIRS | {"task": "kto"},
    "training.undesirable_weight": PAIRS | {"task": "kto"},
    **dict.fromkeys(
        ("data.query_prompt", "data.document_prompt", "training.pooling", "training.embedding_scale"), TEXTS
    ),
}
BESIDE |= {
    f"training.{name}": ROLLOUTS
    for name in ("rewards", "reward_model", "group_size", "max_new_tokens", "temperature", "scale_rewards")
}
BESIDE["training.answer_pattern"] = MATCHED
# The first changes memory and time alone; the torch and contract tests see the blocks run twice. The second is about
# several processes, one of which hangs; the tests of sharded runs stop one.
SEEN_ELSEWHERE = {"training.gradient_checkpointing", "training.process_timeout"}
PATTERNS = ("training.lora.rank_pattern", "training.lora.alpha_pattern")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, chat_file: Path) -> Path:
    from safetensors.numpy import load_file, save_file

    place = tmp_path_factory.mktemp("dead-keys")
    shutil.copytree(tiny_llama, place / "base")
    shutil.copytree(tiny_llama, place / "other-base")
    weights = place / "other-base" / "model.safetensors"
    save_file(
        {key: value * 1.1 for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"}
    )
    lines = chat_file.read_text().splitlines()
    (place / "train.jsonl").write_text("\n".join(lines[:30]))
    (place / "other.jsonl").write_text("\n".join(lines[20:45]))
    both = zip(lines[:16], lines[16:32], strict=True)
    rows = [json.loads(one) | {"talk": json.loads(other)["messages"]} for one, other in both]
    (place / "columns.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "pairs.jsonl").write_text("\n".join(map(pair, lines[:16])))
    (place / "texts.jsonl").write_text("\n".join(map(texts, lines[:16])))
    prompts = [json.dumps({"prompt": json.loads(line)["messages"][:1]}) for line in lines[:6]]
    (place / "prompts.jsonl").write_text("\n".join(prompts))
    (place / "rewards.py").write_text(
        "def vowels(completion, row):\n    return sum(letter in 'aeiou' for letter in completion)\n\n\n"
        "def length(completion, row):\n    return len(completion)\n"
    )
    return place


def pair(line: str) -> str:
    """A row of preferences out of a conversation."""
    question, answer = json.loads(line)["messages"]
    return json.dumps(
        {"chosen": [question, answer], "rejected": [question, answer | {"content": "No idea."}]}
    )


def texts(line: str) -> str:
    """A row of texts that belong together out of a conversation."""
    question, answer = (turn["content"] for turn in json.loads(line)["messages"])
    return json.dumps({"anchor": question, "positive": answer})


def values_of(key: str) -> dict[str, Any]:
    other = OTHERS[key]
    together = isinstance(other, dict) and key not in PATTERNS
    return other if together else {key: other}


def run(place: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Everything about a run but times, speeds and places: what it refused, left behind, or said."""
    from soup_xb.core.config.load import parse_config
    from soup_xb.runs.resume import TrainOptions
    from soup_xb.runs.train import train

    content: dict[str, Any] = {
        "base": "base",
        "backend": "torch",
        "data": {"train": "train.jsonl", "val_split": 0.2, "max_length": 128},
        "training": {"max_steps": 4, "lr": 5e-3, "save_steps": 2, "lora": {"r": 4}},
        "output": "out",
    }
    for key, value in values.items():
        *sections, name = key.split(".")
        target = content
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
        if value is None:
            del target[name]
    said: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Notice):
            said.append(event.problem.render())

    try:
        loaded = parse_config(json.dumps(content), "soup.yaml")
        outcome = train(loaded, TrainOptions(overwrite=True), [listen, *progress(loaded, said)])
    except SoupError as error:
        return {"refused": sorted(problem.code for problem in error.problems)}
    return {"said": said, "folder": outcome.folder.name, **left_behind(outcome.folder)}


def progress(loaded: Any, said: list[str]) -> list[Callable[[Event], None]]:
    """The lines of a run without a terminal, each down to its step."""
    import io

    from soup_xb.cli.progress import ProgressListener

    class Lines(io.StringIO):
        def write(self, text: str) -> int:
            said.extend(re.findall(r"step \d+/\d+", text))
            return len(text)

    return [ProgressListener(0, loaded.config.training.logging_steps, Lines())]


def left_behind(folder: Path) -> dict[str, Any]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        for name in ("seconds", "path", "bytes"):
            event.pop(name, None)
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    settings.pop("base_model_name_or_path")
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return {
        "events": [event for event in events if event["event"] != "notice"],
        "settings": settings,
        "weights": hashlib.sha256(weights).hexdigest(),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").glob("step-*")),
    }


def test_every_key_has_another_value_here() -> None:
    leaves = {name for name, key in KEYS.items() if key.section is None}
    assert leaves == OTHERS.keys() | SEEN_ELSEWHERE


@pytest.fixture(scope="module")
def compared(workplace: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A run with nothing but these values, which many keys are compared with; each is made once."""
    made: dict[str, dict[str, Any]] = {}

    def get(values: dict[str, Any]) -> dict[str, Any]:
        name = json.dumps(values, sort_keys=True)
        if name not in made:
            made[name] = run(workplace, values)
        return made[name]

    return get


@pytest.mark.parametrize("key", OTHERS)
def test_another_value_of_the_key_changes_something(
    key: str,
    workplace: Path,
    compared: Callable[[dict[str, Any]], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(workplace)
    if key == "adapter" and not (workplace / "first").exists():
        assert "weights" in run(workplace, {"output": "first"})
    if key == "training.reward_model" and not (workplace / "judge").exists():
        assert "weights" in run(workplace, PAIRS | {"task": "reward", "output": "judge"})
    assert compared(BESIDE.get(key, {})) != run(workplace, values_of(key))


def test_a_run_compared_with_itself_shows_no_change(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    assert run(workplace, {}) == run(workplace, {})
