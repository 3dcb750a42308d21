"""The arithmetic that LoRA training of a Llama-like base needs, and what this machine could do of it.

Run as a program it prints the machine's matrix-product peak in FLOP/s: the best of 5 float32 products of
1024 x 1536 by 1536 x 1536, sizes as a small model's layers have them.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

ROWS, SIDE, TIMES = 1024, 1536, 5


@dataclass(frozen=True)
class Sizes:
    """What decides the work: parameters of the linear layers in the blocks, and the widths around them."""

    linear_parameters: int
    layers: int
    attention_width: int
    hidden_size: int
    vocabulary: int

    @classmethod
    def of(cls, base: Path) -> Sizes:
        """The sizes of a Llama-like base, from its config.json."""
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        head = config.get("head_dim") or hidden // config["num_attention_heads"]
        query, value = head * config["num_attention_heads"], head * config["num_key_value_heads"]
        block = hidden * (2 * query + 2 * value + 3 * config["intermediate_size"])
        return cls(layers * block, layers, query, hidden, config["vocab_size"])


def step_flops(sizes: Sizes, tokens: float, target_tokens: float, squared_lengths: float) -> float:
    """FLOPs of forward and backward over rows with `tokens` tokens, of which `target_tokens` are trained on.

    Two for each multiply-add. Frozen weights need no gradient of their own: a layer costs one product forward
    and one backward, 4 x parameters x tokens. The head is needed on trained positions alone. Attention has
    two products forward and four backward, over half of the square of each row's length, since it is causal.
    """
    layers = 4 * sizes.linear_parameters * tokens
    head = 4 * sizes.hidden_size * sizes.vocabulary * target_tokens
    attention = 6 * sizes.layers * sizes.attention_width * squared_lengths
    return layers + head + attention


def product_peak() -> float:
    """The best of 5 float32 products, in FLOP/s, after one to warm up."""
    import torch

    left, right = torch.randn(ROWS, SIDE), torch.randn(SIDE, SIDE)
    torch.mm(left, right)
    times = []
    for _ in range(TIMES):
        started = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - started)
    return 2 * ROWS * SIDE * SIDE / min(times)


if __name__ == "__main__":
    print(product_peak())
