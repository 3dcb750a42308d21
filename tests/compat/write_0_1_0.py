"""Writes tests/data/v0_1_0: tiny bases, rows, configs, and the run folders that soup-xb 0.1.0 leaves of them.

It was run with 0.1.0, and is kept to tell how the data came about; later code would write folders of its own:

    PYTHONPATH=/CLONE-OF-0.1.0 OMP_NUM_THREADS=1 python tests/compat/write_0_1_0.py tests/data/v0_1_0

Of each kind there are `finished/KIND`, a whole run of six steps, and `stopped/KIND`, the same run ended by a signal: by
SIGTERM after step 4, or killed after step 5, whose newest checkpoint is that of step 4. Everything is run inside the
folder, so that no path of a machine is in what is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VOCABULARY = 260
STEPS = 6
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWARDS = """def vowels(completion, row):
    return sum(letter in "aeiou" for letter in completion) / 8


def small(completion, row):
    return sum(letter.islower() for letter in completion) / 4
"""
# Each kind with what differs from `base_config`; the keys are those of `training`, but for the first few.
KINDS: dict[str, dict[str, Any]] = {
    "sft": {"killed": True},
    "pissa": {"lora": {"init_strategy": "pissa"}},
    "olora": {"lora": {"init_strategy": "olora"}},
    "dora": {"lora": {"use_dora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 8}}},
    "relora-merge": {"relora_steps": 3, "relora_warmup_ratio": 0.0, "relora_mode": "merge"},
    "vera": {"lr": 0.05, "lora": {"use_vera": True, "r": 4}},
    "experts": {"base": "./moe", "lora": {"target_modules": "auto+experts"}},
    "dpo": {"task": "dpo"},
    "kto": {"task": "kto"},
    "bco": {"task": "bco"},
    "reward": {"task": "reward"},
    "grpo": {
        "task": "grpo",
        "rewards": ["./rewards.py:vowels", "./rewards.py:small"],
        "group_size": 4,
        "max_new_tokens": 6,
    },
    "embedding": {"task": "embedding", "base": "./encoder"},
    "mlx-sft": {"backend": "mlx", "killed": True},
    "mlx-pissa": {"backend": "mlx", "lora": {"init_strategy": "pissa"}},
}
FILES = {
    "dpo": "pairs",
    "kto": "pairs",
    "bco": "pairs",
    "reward": "pairs",
    "grpo": "prompts",
    "embedding": "texts",
}
# Of `finished/sft` the whole adapter folder is kept, of others what is needed to open it.
NEEDLESS = ("README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Runs a config and has this process send itself a signal when the line of a step is written.
STOPPED = """
import os, sys
from pathlib import Path
from soup_xb.core.config_file import load_config
from soup_xb.core.errors import StoppedError
from soup_xb.core.events import StepEvent
from soup_xb.train import train
from soup_xb.train_options import TrainOptions

file, step, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def listen(event):
    if isinstance(event, StepEvent) and event.step == step:
        os.kill(os.getpid(), number)

try:
    train(load_config(Path(file)), TrainOptions(), [listen])
except StoppedError:
    sys.exit(75)
"""


def main() -> None:
    """Write everything below the folder that the command line names."""
    import soup_xb

    if soup_xb.__version__ != "0.1.0":
        sys.exit(f"this is soup-xb {soup_xb.__version__} at {soup_xb.__file__}, not 0.1.0")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    os.chdir(folder)
    write_bases()
    write_rows()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        expected = {kind: write_kind(kind, dict(changes)) for kind, changes in KINDS.items()}
        expected["reward"]["judged"] = judged_by_the_reward_model()
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def write_bases() -> None:
    """A Llama, a Mixtral and a BERT with random weights of a size that matters."""
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": 0,
    }
    causal = {
        **sizes,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    llama = transformers.LlamaConfig(**causal, tie_word_embeddings=True)
    save_base(Path("base"), transformers.LlamaForCausalLM, llama)
    mixtral = transformers.MixtralConfig(
        **causal, tie_word_embeddings=True, num_local_experts=3, num_experts_per_tok=2
    )
    save_base(Path("moe"), transformers.MixtralForCausalLM, mixtral)
    bert = transformers.BertConfig(**sizes, max_position_embeddings=64)
    save_base(Path("encoder"), transformers.BertModel, bert)


def save_base(folder: Path, model_class: Any, config: Any) -> None:
    """A model of that config with its tokenizer."""
    import torch

    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:3])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)


def write_rows() -> None:
    """Two dozen rows of each form, and functions that reward answers."""
    chat, pairs, texts, prompts = [], [], [], []
    for index in range(24):
        question = {"role": "user", "content": f"{index} and {index % 7}?"}
        answer = {"role": "assistant", "content": f"It is {index + index % 7}." + " Sure." * (index % 3)}
        doubtful = {"role": "assistant", "content": f"Perhaps {answer['content'][:8]}"}
        chat.append({"messages": [question, answer]})
        pairs.append({"prompt": [question], "chosen": [answer], "rejected": [doubtful]})
        texts.append({"anchor": question["content"], "positive": answer["content"]})
        prompts.append({"prompt": [question], "answer": index + index % 7})
    rows = {"chat": chat, "pairs": pairs, "texts": texts, "prompts": prompts}
    Path("rows").mkdir()
    for name, content in rows.items():
        Path(f"rows/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    Path("rewards.py").write_text(REWARDS)


def base_config(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The config of a kind: it evaluates and saves every other step, and keeps one checkpoint."""
    task = changes.pop("task", "sft")
    base, backend = changes.pop("base", "./base"), changes.pop("backend", "torch")
    lora = {"r": 2, "alpha": 4, **changes.pop("lora", {})}
    return {
        "base": base,
        "task": task,
        "backend": backend,
        "data": {"train": f"./rows/{FILES.get(task, 'chat')}.jsonl", "val_split": 0.2, "max_length": 64},
        "training": {
            "max_steps": STEPS,
            "batch_size": 4,
            "lr": 0.005,
            "precision": "fp32",
            "eval_steps": 2,
            "save_steps": 2,
            "save_total_limit": 1,
            **changes,
            "lora": lora,
        },
        "output": f"./stopped/{kind}",
    }


def write_kind(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The two run folders of a kind; returns what 0.1.0 got."""
    killed = changes.pop("killed", False)
    config = base_config(kind, changes)
    file = f"{kind}.yaml"
    write_yaml(Path(file), config)
    soupx("train", file, "--output", f"./finished/{kind}")
    finished, stopped = Path(f"finished/{kind}"), Path(f"stopped/{kind}")
    ended, code = ((5, 9), -9) if killed else ((4, 15), 75)
    run([sys.executable, "-c", STOPPED, file, *map(str, ended)], code)
    (stopped / ".lock").unlink(missing_ok=True)
    shutil.rmtree(finished / "checkpoints")
    for name in ("report.html", "reference.safetensors"):
        (finished / name).unlink(missing_ok=True)
    if kind not in ("sft", "embedding"):
        for name in NEEDLESS:
            (finished / "adapter" / name).unlink(missing_ok=True)
    weights = (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    events = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    result: dict[str, Any] = {
        "adapter_sha256": hashlib.sha256(weights).hexdigest(),
        "losses": [event["loss"] for event in events if event["event"] == "step"],
        "eval_losses": [event["loss"] for event in events if event["event"] == "eval"],
    }
    if kind != "reward":
        rows = "texts" if kind == "embedding" else "chat"
        words = ("eval", finished, "--data", f"rows/{rows}.jsonl", "--backend", config["backend"], "--json")
        result["figures"] = json.loads(soupx(*words))
    return result


def judged_by_the_reward_model() -> list[dict[str, float]]:
    """The means of two steps of `rlhf` whose answers the finished reward model judges."""
    changes = {"task": "grpo", "group_size": 4, "max_new_tokens": 6, "max_steps": 2}
    config = base_config("rlhf", changes)
    config |= {"task": "rlhf", "output": "./judged"}
    for key in ("eval_steps", "save_steps", "save_total_limit"):
        del config["training"][key]
    config["training"]["reward_model"] = "./finished/reward"
    write_yaml(Path("rlhf.yaml"), config)
    soupx("train", "rlhf.yaml")
    events = [json.loads(line) for line in Path("judged/metrics.jsonl").read_text().splitlines()]
    shutil.rmtree("judged")
    return [event["means"] for event in events if event["event"] == "step"]


def write_yaml(file: Path, config: dict[str, Any]) -> None:
    """A config as the YAML that a person would write."""
    from soup_xb.core.yaml.yaml_text import write_yaml as as_yaml

    file.write_text(as_yaml(config))


def soupx(*words: object) -> str:
    """What `soupx` writes to stdout."""
    return run([sys.executable, "-m", "soup_xb", *map(str, words)], 0)


def run(words: list[str], code: int) -> str:
    """What a command writes to stdout; it has to end with that code."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != code:
        sys.exit(f"{words[-3:]} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
