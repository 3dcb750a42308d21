"""One run of transformers' Trainer with PEFT, as a user of both would write it. Prints one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)


def encoded_rows(path: Path, tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """Rows as Trainer wants them: the prompt's labels are -100, the answer ends with the end token."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        content = "\n\n".join(text for text in (row["instruction"], row["input"]) if text)
        messages = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        tokens = (prompt + answer)[:max_length]
        labels = ([-100] * len(prompt) + answer)[:max_length]
        rows.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels})
    return rows


def main() -> None:
    """Train as the JSON in the first argument says."""
    task = json.loads(sys.argv[1])
    set_seed(task["seed"])
    tokenizer = AutoTokenizer.from_pretrained(task["base"], trust_remote_code=False)
    rows = encoded_rows(Path(task["rows"]), tokenizer, task["max_length"])
    base = AutoModelForCausalLM.from_pretrained(task["base"], dtype=torch.float32, trust_remote_code=False)
    lora = LoraConfig(
        r=task["rank"], lora_alpha=task["alpha"], target_modules=task["targets"], task_type="CAUSAL_LM"
    )
    arguments = TrainingArguments(
        output_dir=task["output"],
        per_device_train_batch_size=task["batch_size"],
        max_steps=task["steps"],
        learning_rate=task["rate"],
        seed=task["seed"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=get_peft_model(base, lora),
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    started = time.perf_counter()
    loss = trainer.train().training_loss
    seconds = time.perf_counter() - started
    passes = task["steps"] * task["batch_size"] / len(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    targets = [sum(label != -100 for label in row["labels"]) for row in rows]
    result = {
        "seconds": seconds,
        "tokens": passes * sum(lengths),
        "target_tokens": passes * sum(targets),
        "squared_lengths": passes * sum(length**2 for length in lengths),
        "loss": loss,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
