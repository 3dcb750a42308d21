"""The feature x backend table: whole, true to the declarations, and asked before anything loads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import evolve

from soup_xb.core.config import support
from soup_xb.core.config.load import parse_config
from soup_xb.core.config.schema import KEYS, LoadedConfig
from soup_xb.core.config.support import (
    available_backend,
    check_supported,
    choose_backend,
    feature_refusal,
    features_table,
    refusals,
)
from soup_xb.core.config.support_rows import BACKENDS, ROWS, No, Row
from soup_xb.core.errors import ConfigError

NAMES = {row.name for row in ROWS}
LEAST = "base: tiny\ndata:\n  train: rows.jsonl\n"


def load(text: str = "", *overrides: str) -> LoadedConfig:
    return parse_config(LEAST + text, "soup.yaml", overrides)


def installed(*packages: str) -> Callable[[str], bool]:
    return lambda package: package in packages


TORCH = ("torch", "transformers", "peft")
MLX = ("mlx", "mlx_lm")


def without_mlx_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the table say what it says of an engine that is not there."""
    no = No("this version has no MLX engine", "run with `--backend torch`.")
    rows = tuple(evolve(row, mlx=no, feature="engine") if row.name == "backend=mlx" else row for row in ROWS)
    monkeypatch.setattr(support, "ROWS", rows)
    monkeypatch.setattr(support, "_BY_NAME", {row.name: row for row in rows})


@pytest.mark.parametrize("key", KEYS)
def test_every_key_and_every_choice_has_a_row(key: str) -> None:
    assert key in NAMES
    for choice in KEYS[key].choices:
        assert f"{key}={choice}" in NAMES


def test_every_row_is_about_a_declared_key_and_stands_once() -> None:
    assert len(NAMES) == len(ROWS)
    assert {row.key for row in ROWS} <= set(KEYS)
    for row in ROWS:
        # A choice in several words is seen only in the opened base, and no config can write it.
        assert not row.choice or " " in row.choice or row.choice in KEYS[row.key].choices


@pytest.mark.parametrize("row", [row for row in ROWS if row.torch or row.mlx], ids=lambda row: row.name)
def test_a_refusal_has_a_reason_a_way_out_and_a_code(row: Row) -> None:
    assert row.feature
    assert not row.follows or row.follows in NAMES
    for no in filter(None, (row.torch, row.mlx)):
        assert no.because
        assert no.instead.endswith(".")


def test_the_defaults_are_refused_by_neither_backend() -> None:
    assert refusals(load(), "torch") == ()
    assert refusals(load(), "mlx") == ()


REFUSED = [
    ("training.precision=fp16", "fp16"),
]


REFUSED_ON_MLX = [
    *((f"task={task}", task) for task in ("vision", "audio")),
    ("training.router_aux_loss_coef=0.01", "router-loss"),
    ("training.relora_steps=5", "relora"),
    ("training.lora.use_vera=true", "vera"),
]


@pytest.mark.parametrize(("override", "feature"), REFUSED_ON_MLX)
def test_what_torch_alone_does_is_refused_on_mlx_with_the_way_there(override: str, feature: str) -> None:
    assert refusals(load("", override), "torch") == ()
    (problem,) = refusals(load("", override), "mlx")
    assert problem.code == f"mlx-no-{feature}"
    assert "--backend torch" in problem.help


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("override", "feature"), REFUSED)
def test_what_is_not_built_is_refused_with_its_own_code(override: str, feature: str, backend: str) -> None:
    found = refusals(load("", override), backend)
    (problem,) = found
    assert problem.code == f"{backend}-no-{feature}"
    assert f"is not available on the {backend} backend: " in problem.message
    assert problem.where.startswith("command line: ")
    assert problem.help


def test_all_refusals_come_at_once_with_their_lines() -> None:
    loaded = load("task: vision\ntraining:\n  lora: {use_vera: true}\n")
    with pytest.raises(ConfigError) as caught:
        check_supported(loaded, "mlx")
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [
        ("mlx-no-vision", "soup.yaml:4: task"),
        ("mlx-no-vera", "soup.yaml:6: training.lora.use_vera"),
    ]


@pytest.mark.parametrize(
    "override",
    [
        "training.lora.use_dora=true",
        "training.lora.use_rslora=true",
        "training.quantization=4bit",
        "adapter=out",
    ],
)
def test_torch_takes_what_it_has_code_for(override: str) -> None:
    assert refusals(load("", override), "torch") == ()


def test_mlx_refuses_what_it_will_never_do() -> None:
    assert refusals(load("", "training.lora.use_dora=true"), "mlx") == ()
    codes = [problem.code for problem in refusals(load("", "training.relora_steps=5"), "mlx")]
    assert codes == ["mlx-no-relora"]
    refusal = feature_refusal("base=quantized by bitsandbytes", "mlx", "base")
    assert refusal is not None
    assert refusal.code == "mlx-no-bitsandbytes"
    assert refusal.help.endswith("or run with `--backend torch`.")
    assert feature_refusal("base=quantized by bitsandbytes", "torch") is None


def test_auto_is_torch_away_from_apple_silicon() -> None:
    chosen = choose_backend(load(), system="Linux", machine="x86_64", installed=installed(*TORCH, *MLX))
    assert chosen == ("torch", "this is not Apple silicon")


def test_auto_is_torch_where_mlx_has_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    without_mlx_engine(monkeypatch)
    name, reason = choose_backend(load(), system="Darwin", machine="arm64", installed=installed(*TORCH, *MLX))
    assert (name, "no MLX engine" in reason) == ("torch", True)


def test_auto_is_mlx_on_apple_silicon_where_installed_and_supported() -> None:
    apple = {"system": "Darwin", "machine": "arm64"}
    both = installed(*TORCH, *MLX)
    assert choose_backend(load(), **apple, installed=both)[0] == "mlx"
    assert choose_backend(load(), **apple, installed=installed(*TORCH)) == ("torch", "mlx is not installed")
    name, reason = choose_backend(load("", "training.relora_steps=5"), **apple, installed=both)
    assert (name, "`training.relora_steps`" in reason) == ("torch", True)
    assert available_backend("auto", **apple, installed=both)[0] == "mlx"


def test_auto_is_torch_for_vectors_of_texts_whose_base_may_be_an_encoder() -> None:
    apple = {"system": "Darwin", "machine": "arm64", "installed": installed(*TORCH, *MLX)}
    name, reason = choose_backend(load("", "task=embedding"), **apple)
    assert (name, "mlx opens no encoders" in reason) == ("torch", True)
    assert choose_backend(load("", "task=embedding", "backend=mlx"), **apple)[0] == "mlx"


@pytest.mark.parametrize(("backend", "missing"), [("torch", "peft"), ("mlx", "mlx_lm")])
def test_a_backend_that_is_not_installed_says_what_to_install(backend: str, missing: str) -> None:
    there = installed(*(package for package in TORCH + MLX if package != missing))
    for choose in (
        lambda: choose_backend(
            load(f"backend: {backend}\n"), system="Linux", machine="x86_64", installed=there
        ),
        lambda: choose_backend(
            load("", f"backend={backend}"), system="Linux", machine="x86_64", installed=there
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            choose()
        (problem,) = caught.value.problems
        assert problem.code == "backend-not-installed"
        assert problem.help == f'pip install "soup-xb[{backend}]"'
        assert f"`{missing}`" in problem.message


def test_work_without_a_config_refuses_mlx_by_its_engine_row(monkeypatch: pytest.MonkeyPatch) -> None:
    both = installed(*TORCH, *MLX)
    assert available_backend("mlx", system="Linux", machine="x86_64", installed=both)[0] == "mlx"
    without_mlx_engine(monkeypatch)
    with pytest.raises(ConfigError) as caught:
        available_backend("mlx", system="Linux", machine="x86_64", installed=both)
    assert caught.value.problems[0].code == "mlx-no-engine"
    chosen = available_backend("torch", system="Linux", machine="x86_64", installed=installed(*TORCH))
    assert chosen[0] == "torch"


def test_the_table_for_people_has_every_row_and_promises_nothing_without_an_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = features_table()
    assert len(table) == len(ROWS)
    assert {feature.mlx for feature in table} == {"yes", "no"}
    assert {feature.torch for feature in table} == {"yes", "no"}
    assert all(feature.notes for feature in table if "no" in (feature.torch, feature.mlx))
    without_mlx_engine(monkeypatch)
    assert {feature.mlx for feature in features_table()} == {"no"}
