"""The adapter's README: what it is, what it was trained on, how to load it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from soup_xb.core.adapter.readers import Misread, misread_by
from soup_xb.core.run.report import ModuleRow
from soup_xb.core.text import count_text

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The ranks that vLLM allocates for.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_EMBEDDING_CODE = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH/TO/THIS/FOLDER")
queries = model.encode_query(["a question"])
documents = model.encode_document(["a text", "another text"])
print(model.similarity(queries, documents))"""


@frozen(kw_only=True)
class CardFacts:
    """What a model card tells.

    `data` names the training data, `settings` is the resolved YAML, `saved_rank` the largest rank in the
    saved file (twice the trained one after pissa and olora). `kind` is LoRA or VeRA. `embeds`: the model makes vectors
    of texts; `scores`: it is a reward model. `rope` is what was changed of the base's rope parameters. `new_template`:
    conversations were written with a chat template that is not the base's; `other_end`: turns end with a token that the
    base does not name as an end. Losses are None where there were none. `misread` names the programs that the adapter
    is not for.
    """

    base: str
    data: str
    steps: int
    modules: Sequence[ModuleRow]
    saved_rank: int
    misread: Sequence[Misread]
    settings: str
    version: str
    kind: str = "LoRA"
    embeds: bool = False
    scores: bool = False
    train_loss: float | None = None
    eval_loss: float | None = None
    tags: Sequence[str] = ()
    rope: Mapping[str, Any] | None = None
    new_template: bool = False
    other_end: bool = False


def model_card(facts: CardFacts) -> str:
    """README.md of an adapter folder, with the front matter that model hubs read.

    A base that is a local folder is not named in the front matter: hubs refuse a `base_model` that is not one
    of their ids.
    """
    base = facts.base if HUB_ID.fullmatch(facts.base) else ""
    parts = [
        _front_matter(base, facts),
        f"# {facts.kind} adapter for {_code(base or _folder_name(facts.base))}",
        _summary(facts),
        f"## Load it\n\n{_loading(base or 'PATH/TO/BASE', facts)}",
        f"## Modules\n\n{_module_table(facts.modules)}",
        f"## Settings\n\n{_fenced(facts.settings.strip(), 'yaml')}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str, facts: CardFacts) -> str:
    tags = dict.fromkeys([facts.kind.lower(), "peft", "soup-xb", *facts.tags])
    if facts.embeds:
        tags = dict.fromkeys([*tags, "sentence-transformers"])
    task = "sentence-similarity" if facts.embeds else "text-generation"
    task = "text-classification" if facts.scores else task
    lines = ["---", "library_name: peft", f"pipeline_tag: {task}"]
    if base:
        lines.append(f"base_model: {json.dumps(base)}")
    # JSON text is YAML text, so a tag cannot break out of its line.
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---"]
    return "\n".join(lines)


def _summary(facts: CardFacts) -> str:
    losses = [
        f"{name} loss {loss:.4f}"
        for name, loss in (("final training", facts.train_loss), ("evaluation", facts.eval_loss))
        if loss is not None and math.isfinite(loss)
    ]
    trained = f"Trained for {facts.steps:,} steps on {_code(facts.data)} with soup-xb {facts.version}"
    return ": ".join([trained, *([", ".join(losses)] if losses else [])]) + "."


def _loading(base: str, facts: CardFacts) -> str:
    if facts.embeds:
        merge = "soupx merge PATH/TO/THIS/FOLDER --output merged"
        return "\n\n".join(
            [
                f"With sentence-transformers and PEFT installed:\n\n{_fenced(_EMBEDDING_CODE, 'python')}",
                f"As a whole model, which needs no PEFT:\n\n{_fenced(merge, 'bash')}",
            ]
        )
    if facts.scores:
        told = "A reward model: it scores an answer with its prompt, and writes none."
        return f"{told} With PEFT:\n\n{_fenced(_score_code(base), 'python')}"
    parts = [f"With PEFT:\n\n{_fenced(_peft_code(base, facts), 'python')}"]
    if facts.rope is not None:
        parts.insert(
            0,
            "**The base's positions were stretched for the training: this adapter is for the base with the same "
            f"setting**, {_code(json.dumps(dict(facts.rope)))}. On the base as it stands it says something else. "
            f"A model with both in one, which needs no setting: {_code('soupx merge')}.",
        )
    folder, misread = "PATH/TO/THIS/FOLDER", facts.misread
    parts += [f"**Not for {one}.**" for one in misread]
    if facts.kind == "VeRA":
        folder, misread = "plain-lora", ()
        export = f"soupx export PATH/TO/THIS/FOLDER --to peft --output {folder}"
        parts.append(
            "VeRA's frozen random projections, which all modules share, are in the file; PEFT reads it from version "
            f"0.21 on. The same adapter as a plain LoRA of rank {facts.saved_rank}, which the programs below read:"
            f"\n\n{_fenced(export, 'bash')}"
        )
    if not misread_by(misread, "mlx-lm"):
        parts.append(f"With mlx-lm:\n\n{_fenced(_mlx_lm_commands(base, folder), 'bash')}")
    if not misread_by(misread, "llama.cpp"):
        parts.append(f"With llama.cpp:\n\n{_fenced(_llama_cpp_commands(base, folder), 'bash')}")
    if not misread_by(misread, "vLLM"):
        parts.append(f"With vLLM:\n\n{_fenced(_vllm_command(base, facts, folder), 'bash')}")
    merge = f"soupx merge PATH/TO/THIS/FOLDER{base_option(base)} --output merged"
    parts.append(f"As a whole model, for every program that reads the base:\n\n{_fenced(merge, 'bash')}")
    return "\n\n".join(parts)


def base_option(base: str) -> str:
    """`--base` for a base that only its owner's disk has."""
    return " --base PATH/TO/BASE" if base == "PATH/TO/BASE" else ""


def _mlx_lm_commands(base: str, folder: str) -> str:
    return (
        f"soupx export {folder} --to mlx-lm --output mlx-adapter\n"
        f'mlx_lm.generate --model {base} --adapter-path mlx-adapter --prompt "…"'
    )


def _llama_cpp_commands(base: str, folder: str) -> str:
    return (
        "python convert_hf_to_gguf.py BASE_FOLDER --outfile base.gguf  # the base, as a folder\n"
        f"python convert_lora_to_gguf.py --base BASE_FOLDER {folder} --outfile tuned.gguf\n"
        'llama-cli -m base.gguf --lora tuned.gguf -p "…"'
    )


def _peft_code(base: str, facts: CardFacts) -> str:
    classes, config, given = "AutoModelForCausalLM, AutoTokenizer", [], ""
    if facts.rope is not None:
        classes, given = f"AutoConfig, {classes}", ", config=config"
        config = [
            f"config = AutoConfig.from_pretrained({json.dumps(base)})",
            f"config.rope_parameters.update({dict(facts.rope)!r})",
        ]
    ends = []
    if facts.other_end:
        classes = f"{classes}, GenerationConfig"
        # It names the token that the base does not stop at.
        ends = ['model.generation_config = GenerationConfig.from_pretrained("PATH/TO/THIS/FOLDER")']
    return "\n".join(
        [
            "from peft import PeftModel",
            f"from transformers import {classes}",
            "",
            *config,
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}{given})",
            'tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")',
            'model = PeftModel.from_pretrained(base, "PATH/TO/THIS/FOLDER")',
            *ends,
        ]
    )


def _score_code(base: str) -> str:
    named = json.dumps(base)
    return "\n".join(
        [
            "from peft import PeftModel",
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            "",
            f"base = AutoModelForSequenceClassification.from_pretrained({named}, num_labels=1)",
            'tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")',
            'model = PeftModel.from_pretrained(base, "PATH/TO/THIS/FOLDER")',
            'turns = [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]',
            'ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)',
            "score = model(**ids).logits[0, 0]",
        ]
    )


def _vllm_command(base: str, facts: CardFacts, folder: str) -> str:
    rank = facts.saved_rank
    allowed = min((size for size in VLLM_RANKS if size >= rank), default=rank)
    command = f"vllm serve {base} --enable-lora --max-lora-rank {allowed} --lora-modules tuned={folder}"
    template = f" --chat-template {folder}/chat_template.jinja" if facts.new_template else ""
    return command + template + (f" --generation-config {folder}" if facts.other_end else "")


def _module_table(modules: Sequence[ModuleRow]) -> str:
    lines = ["| module | count | rank | alpha | scale | parameters |", "|---|---:|---:|---:|---:|---:|"]
    for row in modules:
        numbers = f"{row.count} | {row.rank} | {row.alpha:g} | {row.scale:.4g} | {count_text(row.parameters)}"
        lines.append(f"| {_code(row.name)} | {numbers} |")
    return "\n".join(lines)


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _code(text: str) -> str:
    plain = "".join(letter for letter in text if letter.isprintable()).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`"


def _folder_name(base: str) -> str:
    return base.rstrip("/").rpartition("/")[2] or base
