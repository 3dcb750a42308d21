"""pissa and olora on MLX: the layer, the formats that a start is read from, and the processes that share the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.lora import LoRALinear

from soup_xb.backends.mlx.adapters import KeyedDropout, StartedLinear
from soup_xb.backends.mlx.processes import Processes
from soup_xb.backends.mlx.quantization import dequantized_weight
from soup_xb.backends.mlx.starts import MlxAlgebra, weight_starts
from soup_xb.core.adapter.starts import weight_start
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.config.schema import LoraConfig
from soup_xb.core.errors import CheckpointError, ModelError

Opener = Callable[..., Any]
STRATEGIES = ("pissa", "olora")


def started(strategy: str, **lora: Any) -> LoraConfig:
    return LoraConfig(r=4, alpha=8, init_strategy=strategy, **lora)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bias", [False, True])
def test_dropout_sees_the_factors_and_not_the_frozen_rest(strategy: str, bias: bool) -> None:
    # The residual form, W x - scale B0 A0 x + scale B A drop(x), by hand.
    mx.random.seed(5)
    linear = nn.Linear(24, 16, bias=bias)
    adapter = AdapterModule("q", 16, 24, 4, 8, 2.0)
    start = weight_start(strategy, linear.weight, adapter, MlxAlgebra())
    begins = (mx.array(start.a).T, mx.array(start.b).T)
    layer = StartedLinear(linear, (24, 16, 4), adapter.scale, begins)
    layer.dropout = KeyedDropout(0.5)
    noise = mx.random.normal((24, 4)), mx.random.normal((4, 16))
    layer.lora_a, layer.lora_b = mx.array(start.a).T + noise[0], mx.array(start.b).T + noise[1]
    x = mx.random.normal((3, 5, 24))
    rest = x @ (linear.weight - 2.0 * mx.array(start.b) @ mx.array(start.a)).T
    rest = rest + (linear.bias if bias else 0.0)
    for key in (None, mx.random.key(3)):
        layer.dropout.set_key(key)
        expected = rest + 2.0 * (layer.dropout(x) @ layer.lora_a @ layer.lora_b)
        np.testing.assert_allclose(np.array(layer(x)), np.array(expected), atol=2e-5)
    assert layer.dropout.is_on
    assert not np.allclose(np.array(layer.dropout(x)), np.array(x))


def test_a_module_without_a_start_has_mlx_lm_s_own_layer(opener: Opener) -> None:
    plain, _ = opener()
    assert {type(layer) for (layer,) in plain._adapters.layers.values()} == {LoRALinear}
    session, _ = opener(lora=started("pissa"))
    assert {type(layer) for (layer,) in session._adapters.layers.values()} == {StartedLinear}


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_quantized_weight_is_read_in_float32(mode: str, dtype: Any) -> None:
    plain = nn.Linear(128, 64, bias=False)
    plain.set_dtype(dtype)
    layer = nn.QuantizedLinear.from_linear(plain, group_size=None, bits=None, mode=mode)
    weight = dequantized_weight(layer)
    assert (weight.dtype, weight.shape) == (mx.float32, (64, 128))
    x = mx.random.normal((3, 128))
    layer.set_dtype(mx.float32)
    np.testing.assert_allclose(np.array(x @ weight.T), np.array(layer(x)), atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_base_in_mlx_s_own_format_starts_from_its_dequantized_weights(
    opener: Opener, quantized_llama: Path, strategy: str, precision: str
) -> None:
    session, plan = opener(quantized_llama, lora=started(strategy), precision=precision)
    tokens = plan.rows[0].sequences[0].tokens[None]
    np.testing.assert_array_equal(session.logits(tokens), session.logits(tokens, adapter=False))
    adapter = plan.adapters.modules[0]
    linear = session._adapters.layers[adapter.name][0].linear
    assert isinstance(linear, nn.QuantizedLinear)
    weight = np.array(dequantized_weight(linear)).astype(np.float64)
    start = session._adapters.starts[adapter.name]
    if strategy == "pissa":
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        expected = (left[:, :4] * values[:4]) @ right[:4] / 2.0
    else:
        left = np.linalg.qr(weight)[0][:, :4]
        expected = left @ left.T @ weight
    np.testing.assert_allclose(start.b @ start.a, expected, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_starts_are_the_same_whichever_process_computes_them(
    opener: Opener, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    session, plan = opener(lora=started(strategy))
    alone = session._adapters.starts
    parts: list[dict[str, mx.array]] = []
    monkeypatch.setattr(Processes, "sum", lambda self, arrays: parts.append(arrays) or arrays)
    monkeypatch.setattr(Processes, "largest", lambda self, value: value)
    with session._adapters.switched_off():
        for process in range(2):
            weight_starts(session.model, plan.adapters, session._opened.places, Processes(process, 2))
    expected = {
        f"{name}.{factor}": getattr(start, factor) for name, start in alone.items() for factor in "ab"
    }
    assert parts[0].keys() == parts[1].keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.array(parts[0][name] + parts[1][name]), array)
        assert not np.array(parts[0][name]).any() or not np.array(parts[1][name]).any()


def test_a_process_whose_weights_are_whole_stops_with_the_one_whose_are_not(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, plan = opener(lora=started("pissa"))
    broken = plan.adapters.modules[3]
    monkeypatch.setattr(Processes, "largest", lambda self, value: max(value, 4))
    with session._adapters.switched_off(), pytest.raises(ModelError, match=f"`{broken.name}`"):
        weight_starts(session.model, plan.adapters, session._opened.places, Processes(0, 2))


def test_a_state_with_merges_is_refused(opener: Opener, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    session, plan = opener(lora=started("pissa"))
    session.save_state(tmp_path)
    file, name = tmp_path / "factors.safetensors", plan.adapters.modules[0].name
    tensors = load_file(file)
    tensors |= {
        f"{name}.piece0_A": tensors[f"{name}.start_A"],
        f"{name}.piece0_B": tensors[f"{name}.start_B"],
    }
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="holds merges") as raised:
        session.load_state(tmp_path)
    assert raised.value.problems[0].code == "foreign-checkpoint"
