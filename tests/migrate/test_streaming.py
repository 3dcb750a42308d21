"""`streaming` of other tools becomes `data.streaming` where a run of ours could stream, else it is told why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from soup_xb.migrate.migration import Migration

Accounted = Callable[..., Migration]
AXOLOTL = "base_model: x\nadapter: lora\nval_set_size: 0\n"
LLAMA_FACTORY = "model_name_or_path: x\nstage: sft\nfinetuning_type: lora\n"


def carried(done: Migration) -> dict[str, Any]:
    return {one.key: (one.to, one.value) for one in done.carried}


@pytest.mark.parametrize(
    "text",
    [
        AXOLOTL + "pretraining_dataset: org/texts\nmax_steps: 9\nstreaming: true\n",
        AXOLOTL + "datasets: [{path: org/chats, type: chat_template}]\nmax_steps: 9\nstreaming: true\n",
        LLAMA_FACTORY + "dataset: org/chats\ndataset_dir: ONLINE\nmax_steps: 9\nstreaming: true\n",
    ],
)
def test_a_stream_of_a_hub_dataset_stays_one(accounted: Accounted, text: str) -> None:
    done = accounted(text)
    assert carried(done)["streaming"] == ("data.streaming", True)
    assert "streaming: true" in done.text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (AXOLOTL + "datasets: [{path: org/chats}]\n", "needs `training.max_steps`"),
        (AXOLOTL + "datasets: [{path: a.jsonl}]\nmax_steps: 9\n", "local files"),
        (AXOLOTL + "datasets: [{path: org/a}, {path: org/b}]\nmax_steps: 9\n", "from one dataset"),
        (LLAMA_FACTORY + "dataset: chats\nmax_steps: 9\n", "local files"),
        (
            LLAMA_FACTORY + "dataset: org/a\neval_dataset: org/b\ndataset_dir: ONLINE\nmax_steps: 9\n",
            "downloaded whole",
        ),
    ],
)
def test_where_nothing_could_be_streamed_the_reason_is_told(
    accounted: Accounted, text: str, reason: str
) -> None:
    done = accounted(text + "streaming: true\nbuffer_size: 100\n")
    left = {one.key: one.reason for one in done.left}
    assert reason in left["streaming"]
    assert "in an order of the seed" in left["buffer_size"]
    assert "streaming:" not in done.text.replace("# streaming", "")


def test_no_stream_is_what_happens_without_the_key(accounted: Accounted) -> None:
    done = accounted(AXOLOTL + "datasets: [{path: a.jsonl}]\nstreaming: false\n")
    assert carried(done)["streaming"] == ("", False)
