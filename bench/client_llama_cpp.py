"""What llama.cpp makes of an adapter or of a merged model, after its own converters.

    python bench/client_llama_cpp.py JOB.json

llama-cpp-python's source package holds llama.cpp's source, and so both converters; `LLAMA_CPP` names that folder.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from client_job import Job, Task, read_job, save_numbers, save_told

SOURCE = Path(os.environ["LLAMA_CPP"])
CONTEXT = 1024


def main() -> None:
    """Work through the job's tasks."""
    job = read_job(("llama-cpp-python", "transformers"))
    scratch = Path(job.scratch)
    for task in job.tasks:
        model = converted(scratch, "convert_hf_to_gguf.py", task.whole)
        adapter = None
        if task.adapter is not None:
            adapter = converted(scratch, "convert_lora_to_gguf.py", task.adapter, "--base", task.base)
        answer_task(task, job, open_model(model, adapter))
        # A converted model is as large as the model itself: only the base's is needed again.
        if adapter is not None:
            adapter.unlink()
        elif task.model is not None:
            model.unlink()


def answer_task(task: Task, job: Job, model: llama_cpp.Llama) -> None:
    """Save what the task asks for."""
    if task.asks == "numbers":
        model.eval(list(job.tokens))
        save_numbers(task, np.array(model.scores[: len(job.tokens)]))
    elif task.asks == "tokenizer":
        save_told(task, ids=model.tokenize(job.text.encode(), add_bos=False, special=True))
    else:
        save_told(task, **answer(model, job))
    model.close()


def open_model(model: Path, adapter: Path | None) -> llama_cpp.Llama:
    """Model and adapter at scale 1, every number of theirs in 32 bits, the cache of keys and values too."""
    return llama_cpp.Llama(
        str(model),
        lora_path=None if adapter is None else str(adapter),
        lora_scale=1.0,
        n_ctx=CONTEXT,
        n_batch=CONTEXT,
        n_ubatch=CONTEXT,
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )


def answer(model: llama_cpp.Llama, job: Job) -> dict[str, Any]:
    """A greedy answer by the chat template in the file."""
    given = model.create_chat_completion(job.turns, temperature=0, max_tokens=job.longest_answer)
    choice = given["choices"][0]
    return {
        "stopped": choice["finish_reason"] == "stop",
        "tokens": given["usage"]["completion_tokens"],
        "text": choice["message"]["content"],
    }


def converted(scratch: Path, converter: str, folder: str, *more: str) -> Path:
    """`folder` as a GGUF file in float32. Ends the script with the converter's last line where it refuses."""
    newest = max(file.stat().st_mtime_ns for file in Path(folder).iterdir())
    name = hashlib.sha256(f"{converter} {Path(folder).resolve()} {newest}".encode()).hexdigest()[:16]
    file = scratch / f"{name}.gguf"
    if file.is_file():
        return file
    part = scratch / f"{name}.part.gguf"
    command = [
        sys.executable,
        str(SOURCE / converter),
        folder,
        "--outtype",
        "f32",
        "--outfile",
        str(part),
        *more,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not part.is_file():
        told = done.stderr.strip().splitlines()
        sys.exit(f"{converter}: {told[-1] if told else f'exit status {done.returncode}'}")
    part.replace(file)
    return file


if __name__ == "__main__":
    main()
