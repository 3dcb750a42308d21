"""What stock mlx-lm makes of an exported adapter or of a merged model.

python bench/client_mlx_lm.py JOB.json
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from client_job import Job, Task, read_job, save_numbers, save_told


def main() -> None:
    """Work through the job's tasks."""
    job = read_job(("mlx", "mlx-lm", "transformers"))
    for task in job.tasks:
        model, tokenizer = mlx_lm.load(task.whole, adapter_path=task.adapter)
        if task.asks == "numbers":
            save_numbers(task, np.array(model(mx.array([job.tokens]))[0].astype(mx.float32)))
        elif task.asks == "tokenizer":
            save_told(task, ids=tokenizer.encode(job.text))
        else:
            save_told(task, **answer(model, tokenizer, task, job))


def answer(model: Any, tokenizer: Any, task: Task, job: Job) -> dict[str, Any]:
    """A greedy answer; mlx-lm takes its end from the model's folder."""
    prompt = tokenizer.apply_chat_template(job.turns, add_generation_prompt=True)
    parts = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=job.longest_answer))
    text = "".join(part.text for part in parts)
    return {"stopped": parts[-1].finish_reason == "stop", "tokens": parts[-1].generation_tokens, "text": text}


if __name__ == "__main__":
    main()
