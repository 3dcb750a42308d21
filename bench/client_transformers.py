"""What transformers and PEFT make of an adapter or a model: the reference, and the same with older versions.

    python bench/client_transformers.py JOB.json

`clients.py` runs it in two environments: the project's own (transformers 5), and transformers 4.57 with PEFT 0.17.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from client_job import Job, Task, read_job, save_numbers, save_told
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main() -> None:
    """Work through the job's tasks."""
    job = read_job(("torch", "transformers", "peft"))
    for task in job.tasks:
        if task.asks == "tokenizer":
            save_told(
                task, ids=AutoTokenizer.from_pretrained(task.adapter or task.whole)(job.text)["input_ids"]
            )
        elif task.asks == "numbers":
            with torch.inference_mode():
                save_numbers(task, open_model(task)(torch.tensor([job.tokens])).logits[0].float().numpy())
        else:
            save_told(task, **answer(task, job))


def open_model(task: Task) -> Any:
    """The model in float32, with the adapter on it."""
    config = AutoConfig.from_pretrained(task.whole)
    if task.rope is not None:
        config.rope_parameters.update(task.rope)
    model = AutoModelForCausalLM.from_pretrained(task.whole, config=config, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, task.adapter) if task.adapter else model).eval()


def answer(task: Task, job: Job) -> dict[str, Any]:
    """A greedy answer with what the folder itself says of its end; an adapter's folder may say it too."""
    folder = task.adapter or task.whole
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = open_model(task)
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(
        job.turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        ids = model.generate(**asked, do_sample=False, max_new_tokens=job.longest_answer)[0]
    new = ids[asked["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return {"stopped": len(new) < job.longest_answer, "tokens": len(new), "text": text}


if __name__ == "__main__":
    main()
