"""Reading a config: what is accepted, and every problem at once with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from soup_xb.core.config.load import dump_config, load_config, parse_config
from soup_xb.core.config.schema import KEYS, Config, DataConfig, LoraConfig, RopeScalingConfig, TrainingConfig
from soup_xb.core.errors import ConfigError, Problem

LEAST = "base: tiny\ndata:\n  train: rows.jsonl\n"


def problems_of(text: str, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "soup.yaml", overrides)
    return caught.value.problems


def the_problem_of(text: str, *overrides: str) -> Problem:
    (problem,) = problems_of(text, *overrides)
    return problem


def training(lines: str) -> str:
    return f"{LEAST}training:\n" + "".join(f"  {line}\n" for line in lines.splitlines())


def lora(lines: str) -> str:
    return training("lora:\n" + "\n".join(f"  {line}" for line in lines.splitlines()))


def test_the_least_config_has_the_documented_defaults() -> None:
    config = parse_config(LEAST, "soup.yaml").config
    assert config == Config(base="tiny", data=DataConfig(train=("rows.jsonl",)))
    assert (config.task, config.backend, config.output) == ("sft", "auto", "./output")
    assert (config.training.epochs, config.training.lr, config.training.lora.alpha) == (3, 2e-4, 32)


@pytest.mark.parametrize(
    ("written", "value"),
    [("2e-4", 2e-4), ('"1e-4"', 1e-4), ("1", 1.0), (".5", 0.5), ("1_0e-3", 0.01), ("5E-5", 5e-5)],
)
def test_a_number_may_be_written_in_these_ways(written: str, value: float) -> None:
    lr = parse_config(training(f"lr: {written}"), "soup.yaml").config.training.lr
    assert lr == value
    assert isinstance(lr, float)


def test_integers_follow_yaml_1_2() -> None:
    config = parse_config(training("max_steps: 1_000\nseed: 012"), "soup.yaml").config
    assert (config.training.max_steps, config.training.seed) == (1000, 12)


def test_no_is_text_and_not_false() -> None:
    assert parse_config("base: no\ndata: {train: on}", "soup.yaml").config.base == "no"
    assert the_problem_of(training("gradient_checkpointing: no")).message == 'must be true or false, got "no"'


def test_a_date_is_text() -> None:
    assert parse_config("base: 2024-01-01\ndata: {train: x}", "soup.yaml").config.base == "2024-01-01"


def test_paths_are_one_or_a_list() -> None:
    text = "base: tiny\ndata:\n  train: [a.jsonl, b.jsonl]\n  eval: c.jsonl\n"
    data = parse_config(text, "soup.yaml").config.data
    assert (data.train, data.eval) == (("a.jsonl", "b.jsonl"), ("c.jsonl",))


def test_an_empty_section_has_its_defaults() -> None:
    assert parse_config(f"{LEAST}training:\n  # lr: 1\n", "soup.yaml").config.training == TrainingConfig()


def test_use_olora_is_the_olora_start_on_its_own_line() -> None:
    loaded = parse_config(lora("use_olora: true"), "soup.yaml")
    assert loaded.config.training.lora == LoraConfig(init_strategy="olora")
    assert loaded.where("training.lora.init_strategy") == "soup.yaml:6: training.lora.init_strategy"


def test_places_name_file_and_line_or_the_command_line() -> None:
    loaded = parse_config(lora("rank_pattern: {q_proj: 8}"), "soup.yaml", ["training.lr=1e-3"])
    assert loaded.where("data.train") == "soup.yaml:3: data.train"
    assert loaded.where("training.lr") == "command line: training.lr"
    assert loaded.where("output") == "soup.yaml: output"
    assert loaded.written["training.lora.rank_pattern.q_proj"] == 6


def test_pattern_maps_cannot_be_changed_and_keep_their_order() -> None:
    pattern = parse_config(
        lora("rank_pattern: {v_proj: 4, q_proj: 8}"), "soup.yaml"
    ).config.training.lora.rank_pattern
    assert list(pattern) == ["v_proj", "q_proj"]
    with pytest.raises(TypeError):
        pattern["k_proj"] = 2  # type: ignore[index]


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("lr: fast", "wrong-type", 'must be a number, got "fast"'),
        ("lr: -1", "out-of-range", "must be above 0 and at most 1, got -1"),
        ("lr: .nan", "not-finite", "must be a finite number, got nan"),
        ("lr: .inf", "not-finite", "must be a finite number, got inf"),
        ('lr: "1e999"', "not-finite", "must be a finite number, got inf"),
        ("lr: true", "wrong-type", "must be a number, got true"),
        ("lr:", "missing-value", "has no value"),
        ("epochs: 0", "out-of-range", "must be 1 to 10000, got 0"),
        ("epochs: true", "wrong-type", "must be an integer, got true"),
        ("epochs: 1.0", "wrong-type", "must be an integer, got 1.0"),
        ('batch_size: "4"', "wrong-type", 'must be an integer, got "4"'),
        ("batch_size: [4]", "wrong-type", "must be an integer, got a list"),
        ("precision: 16", "unknown-choice", "must be one of auto, fp32, bf16, fp16, got 16"),
        ("lora: 8", "wrong-type", "must be a mapping of keys, got 8"),
        ("seed: " + "9" * 5000, "wrong-type", None),
        ("max_grad_norm: 1" + "0" * 400, "out-of-range", "must be 0 to 1000000000, got a very large number"),
    ],
)
def test_a_training_value_is_refused(line: str, code: str, message: str | None) -> None:
    problem = the_problem_of(training(line))
    assert problem.code == code
    assert message is None or problem.message == message
    assert problem.where == f"soup.yaml:5: training.{line.partition(':')[0]}"


@pytest.mark.parametrize(
    ("line", "code", "part"),
    [
        ("r: 0", "out-of-range", "must be 1 to 1024, got 0"),
        ("r: 1.9", "wrong-type", "must be an integer, got 1.9"),
        ("dropout: 1.0", "out-of-range", "must be at least 0 and below 1, got 1.0"),
        ("rank_pattern: {q_proj: true}", "wrong-type", "`q_proj` must be an integer, got true"),
        ("rank_pattern: {q_proj: 1025}", "out-of-range", "`q_proj` must be 1 to 1024, got 1025"),
        ("alpha_pattern: {q_proj: 0}", "out-of-range", "`q_proj` must be 1 to 1024, got 0"),
        ("rank_pattern: {'': 8}", "bad-pattern", "it is empty"),
        ('rank_pattern: {"q\\0": 8}', "bad-pattern", "NUL"),
        ("rank_pattern: q_proj", "wrong-type", 'must be a mapping of pattern to integer, got "q_proj"'),
        ("target_modules: []", "wrong-type", "got an empty list"),
        ("target_modules: [auto, q_proj]", "wrong-type", "`auto` stands alone"),
        ("target_modules: [1]", "wrong-type", "entry 1 must be text, got 1"),
        ("init_strategy: pizza", "unknown-choice", "must be one of random, pissa, olora"),
    ],
)
def test_a_lora_value_is_refused(line: str, code: str, part: str) -> None:
    problem = the_problem_of(lora(line))
    assert problem.code == code
    assert part in problem.message
    assert problem.where == f"soup.yaml:6: training.lora.{line.partition(':')[0]}"


def test_257_patterns_are_too_many_and_256_are_not() -> None:
    def patterns(count: int) -> str:
        return lora("rank_pattern: {" + ", ".join(f"m{index}: 8" for index in range(count)) + "}")

    assert len(parse_config(patterns(256), "soup.yaml").config.training.lora.rank_pattern) == 256
    assert the_problem_of(patterns(257)).message == "has 257 patterns, at most 256 are allowed"


def test_data_train_must_not_be_empty() -> None:
    assert the_problem_of("base: tiny\ndata: {train: []}").message.endswith("got an empty list")
    assert the_problem_of("base: tiny\ndata: {train: ' '}").message == "must not be empty"
    assert the_problem_of("base: tiny\ndata: {train: [a, '']}").message == "entry 2 must not be empty"


def test_missing_keys_are_all_named() -> None:
    found = problems_of("task: sft")
    assert [(problem.code, problem.where) for problem in found] == [
        ("missing-key", "soup.yaml: base"),
        ("missing-key", "soup.yaml: data.train"),
    ]


def test_all_problems_of_a_file_come_at_once_in_the_order_of_the_lines() -> None:
    text = (
        training("lr: fast\nepochs: 0\noptimizer: sgd\nadam_beta1: 0.8\nlora: {r: 0, rnak: 4}")
        + "base: again\n"
    )
    found = problems_of(text, "training.nothing=1", "lr=")
    assert [problem.code for problem in found] == [
        "unknown-key",
        "override",
        "wrong-type",
        "out-of-range",
        "key-without-effect",
        "unknown-key",
        "out-of-range",
        "duplicate-key",
    ]


def test_a_key_at_fault_raises_no_contradiction_with_others() -> None:
    assert the_problem_of(f"{LEAST}  val_split: much\ntraining: {{eval_steps: 5}}").code == "wrong-type"
    assert [problem.code for problem in problems_of("base: x\ndata: 5\ntraining: {eval_steps: 5}")] == [
        "wrong-type"
    ]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (training("learing_rate: 1"), "`lr`"),
        (training("learning_rate: 1"), "`lr`"),
        (training("per_device_train_batch_size: 1"), "`batch_size`"),
        (training("num_train_epochs: 1"), "`epochs`"),
        (training("lora_r: 1"), "`training.lora.r`"),
        (training("max_length: 1"), "`data.max_length`"),
        (lora("rnak: 1"), "`r`"),
        (f"{LEAST}lr: 1", "`training.lr`"),
        (f"{LEAST}training.lr: 1", "`training.lr`"),
        (f"{LEAST}model_name_or_path: x", "`base`"),
    ],
)
def test_an_unknown_key_asks_for_the_key_that_was_meant(text: str, meant: str) -> None:
    problem = the_problem_of(text)
    assert problem.code == "unknown-key"
    assert problem.help == f"did you mean {meant}?"


def test_a_wrong_choice_asks_for_the_near_one() -> None:
    assert the_problem_of(lora("init_strategy: pizza")).help == "did you mean `pissa`?"
    assert the_problem_of(training("precision: BF16")).help == "did you mean `bf16`?"


def test_an_access_token_is_never_shown() -> None:
    assert "hf_" not in the_problem_of(training("lr: hf_abcdefghijklmnop")).render()


def test_escape_codes_never_reach_the_terminal() -> None:
    found = problems_of(LEAST + '"\\e[31mred": 1\n') + problems_of(training('lr: "\\e[31m"'))
    assert all("\x1b" not in problem.render() for problem in found)


def test_a_surrogate_is_refused_before_anything_is_written() -> None:
    assert the_problem_of('base: "\\ud800"\ndata: {train: x}').code == "control-character"


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        (lora("use_olora: true\ninit_strategy: random"), ["contradiction"]),
        (lora("use_olora: true\ninit_strategy: pissa"), ["contradiction"]),
        (lora("init_strategy: pissa\nuse_vera: true"), ["contradiction"]),
        (lora("init_strategy: olora\nuse_dora: true"), ["contradiction"]),
        (lora("use_vera: true\nrank_pattern: {q_proj: 8}"), ["contradiction"]),
        (lora("use_vera: true\nalpha_pattern: {q_proj: 8}"), ["contradiction"]),
        (lora("use_vera: true\nuse_dora: true\nuse_rslora: true"), ["contradiction"] * 2),
        (lora("use_vera: true\ntarget_modules: auto+experts"), ["contradiction"]),
        (lora("use_dora: true\ntarget_modules: auto+experts"), ["contradiction"]),
        (training("warmup_steps: 5\nwarmup_ratio: 0.1"), ["key-without-effect"]),
        (training("relora_prune_ratio: 0.5\nrelora_mode: merge"), ["key-without-effect"] * 2),
        (training("relora_steps: 9\nrelora_prune_ratio: 0.5\nrelora_mode: merge"), ["key-without-effect"]),
        (training("relora_steps: 9\nrelora_rewarm_steps: 5"), ["key-without-effect"]),
        (training("relora_steps: 9\nrelora_mode: merge\nrelora_rewarm_steps: 9"), ["contradiction"]),
        (training("relora_steps: 9\nrelora_mode: merge\nquantization: 4bit"), ["contradiction"]),
        (training("relora_steps: 9\nrelora_mode: merge\nrelora_reset_optimizer: false"), ["contradiction"]),
        (
            training("optimizer: sgd\nadam_beta1: 0.9\nadam_beta2: 0.9\nadam_epsilon: 1e-8"),
            ["key-without-effect"] * 3,
        ),
        (training("eval_steps: 5"), ["contradiction"]),
        (training("save_total_limit: 2"), ["key-without-effect"]),
        (f"{LEAST}  eval: other.jsonl\n  val_split: 0.1\n", ["contradiction"]),
        (f"{LEAST}  split: test\n  subset: en\n", ["key-without-effect"] * 2),
        (f"{LEAST}  format: preference\n", ["contradiction"]),
        (f"{LEAST}output: ./tiny/\n", ["contradiction"]),
        (f"{LEAST}adapter: out\noutput: out\n", ["contradiction"]),
        (lora("init_strategy: pissa") + "adapter: out\n", ["contradiction"]),
    ],
)
def test_a_contradiction_is_refused(text: str, codes: list[str]) -> None:
    assert [problem.code for problem in problems_of(text)] == codes


def test_a_contradiction_names_both_lines() -> None:
    message = the_problem_of(lora("use_olora: true\ninit_strategy: pissa")).message
    assert "line 6" in message
    assert "line 7" in message


def test_the_allowed_neighbours_of_contradictions_load() -> None:
    for text in (
        lora("use_olora: true\ninit_strategy: olora"),
        lora("use_dora: true\nuse_rslora: true"),
        training("relora_steps: 9\nrelora_mode: merge\nrelora_rewarm_steps: 8\nrelora_reset_optimizer: true"),
        f"{LEAST}  eval: other.jsonl\n  val_split: 0\n",
        "base: x\ndata: {train: tatsu-lab/alpaca, split: test, subset: en}\n",
        training("warmup_ratio: 0.1\nwarmup_steps: null"),
        training("relora_rewarm_steps: null"),
        training("save_total_limit: null\nadam_beta1: 0.8"),
    ):
        parse_config(text, "soup.yaml")


@pytest.mark.parametrize(
    ("text", "code", "key"),
    [
        (training("max_steps: 5\nepochs: 2"), "key-without-effect", "training.epochs"),
        (lora("use_vera: true\nalpha: 8"), "key-without-effect", "training.lora.alpha"),
        (lora("init_strategy: pissa\ndropout: 0.1"), "start-not-exact", "training.lora.dropout"),
        (training("max_steps: 5\nwarmup_steps: 5"), "warmup-never-ends", "training.warmup_steps"),
        (f"{LEAST}  eval: rows.jsonl\n", "eval-is-train", "data.eval"),
        (f"{LEAST}  format: text\n  chat_template: x\n", "key-without-effect", "data.chat_template"),
    ],
)
def test_what_may_be_a_mistake_is_a_warning(text: str, code: str, key: str) -> None:
    (warning,) = parse_config(text, "soup.yaml").warnings
    assert warning.code == code
    assert warning.where.startswith("soup.yaml:")
    assert warning.where.endswith(f": {key}")


def test_overrides_win_over_the_file_and_the_last_one_wins() -> None:
    loaded = parse_config(training("lr: 1e-5"), "soup.yaml", ["training.lr=1e-3", "training.lr=1e-4"])
    assert loaded.config.training.lr == 1e-4


def test_an_override_takes_maps_lists_and_null() -> None:
    overrides = [
        "training.lora.rank_pattern={q_proj: 8}",
        "data.train=[a, b]",
        "training.lr=null",
        "training.seed=null",
    ]
    config = parse_config(training("lr: 1e-5\nseed: 7"), "soup.yaml", overrides).config
    assert dict(config.training.lora.rank_pattern) == {"q_proj": 8}
    assert config.data.train == ("a", "b")
    assert (config.training.lr, config.training.seed) == (2e-4, 42)


def test_an_override_may_bring_a_required_key_and_take_it_away() -> None:
    assert parse_config("data: {train: x}", "soup.yaml", ["base=tiny"]).config.base == "tiny"
    assert the_problem_of(LEAST, "base=null").code == "missing-key"


@pytest.mark.parametrize(
    ("override", "code", "part"),
    [
        ("lr=", "override", "not key=value"),
        ("a", "override", "not key=value"),
        ("=5", "override", "not key=value"),
        ("training.lora.rr=8", "unknown-key", "`training.lora.r`"),
        ("lr=1", "unknown-key", "`training.lr`"),
        ("training={lr: 1}", "override", "training.epochs"),
        ("training.lr=[", "yaml-syntax", "close every bracket"),
        ("training.lr=*x", "yaml-alias", "quote"),
        ("training.lr=fast", "wrong-type", "must be a number"),
        ("training.lora.rank_pattern={a: 1, a: 2}", "duplicate-key", "twice"),
    ],
)
def test_a_bad_override_is_refused(override: str, code: str, part: str) -> None:
    problem = the_problem_of(LEAST, override)
    assert problem.code == code
    assert part in problem.render()
    assert problem.where.startswith("command line")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "config-empty"),
        (b"# nothing\n", "config-empty"),
        (b"- base\n", "not-a-mapping"),
        (b"text\n", "not-a-mapping"),
        (LEAST.encode("utf-16"), "config-not-utf8"),
        (b"base: \xff\n", "config-not-utf8"),
        (b"base: x\n" * 40_000, "config-too-large"),
        (b"a: \x00\n", "control-character"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, code: str) -> None:
    file = tmp_path / "soup.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert caught.value.problems[0].code == code
    assert str(file) in caught.value.problems[0].where


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "soup.yaml"
    file.write_text(LEAST, "utf-8-sig")
    assert load_config(file).config.base == "tiny"


def test_unknown_keys_by_the_thousand_are_counted_not_listed() -> None:
    found = problems_of(LEAST + "".join(f"key{index}: 1\n" for index in range(2000)))
    assert len(found) == 21
    assert found[0].message == "1980 more keys are unknown"


# What a config may hold, drawn key by key from the declarations.
def test_what_the_backend_refuses_is_told_together_with_the_rest() -> None:
    text = "base: tiny\ndata: {train: x}\ntraining:\n  precision: fp16\n  lr: -1\n  relora_steps: 5\n"
    for backend, refused in (("torch", ["torch-no-fp16"]), ("mlx", ["mlx-no-fp16", "mlx-no-relora"])):
        with pytest.raises(ConfigError) as caught:
            parse_config(text, "soup.yaml", [f"backend={backend}"])
        assert [problem.code for problem in caught.value.problems] == [
            refused[0],
            "out-of-range",
            *refused[1:],
        ]
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "soup.yaml")
    # `auto` may still take the engine that has it.
    assert [problem.code for problem in caught.value.problems] == ["torch-no-fp16", "out-of-range"]


def test_an_access_token_is_refused_and_never_shown() -> None:
    token = "hf_" + "aBcD" * 9
    for text in (
        f"base: {token}\ndata: {{train: x}}\n",
        f"base: b\ndata: {{train: [x, 'https://{token}@hub/x.jsonl']}}\n",
        f"base: b\ndata: {{train: x}}\noutput: ./runs/{token}\n",
        f"base: b\ndata: {{train: x}}\ntraining: {{lora: {{rank_pattern: {{{token}: 4}}}}}}\n",
        f"base: b\ndata: {{train: x}}\n{token}: 1\n",
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config(text, "soup.yaml")
        assert {problem.code for problem in caught.value.problems} <= {"access-token", "unknown-key"}
        assert "aBcDaBcD" not in str(caught.value)


@pytest.mark.parametrize(("line", "code"), [("k{}: 1", "unknown-key"), ("base: x", "duplicate-key")])
def test_thousands_of_wrong_keys_are_counted_and_not_listed(line: str, code: str) -> None:
    text = "base: tiny\ndata: {train: x}\n" + "".join(f"{line.format(index)}\n" for index in range(1000))
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "soup.yaml")
    found = [problem for problem in caught.value.problems if problem.code == code]
    assert len(found) == 21
    assert any("980 more keys" in problem.message for problem in found)


_NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=30).filter(str.strip)
_SETTING = {
    "text": _NAMES,
    "boolean": st.booleans(),
    "paths": st.lists(_NAMES, min_size=1, max_size=3).map(tuple),
    "targets": _NAMES
    | st.lists(_NAMES.filter(lambda name: name not in ("auto", "all-linear")), min_size=1).map(tuple),
    "ranks": st.dictionaries(_NAMES, st.integers(1, 1024), max_size=5),
    "names": st.dictionaries(st.sampled_from(["text", "messages", "output"]), _NAMES, max_size=3),
}


def _drawn(key: str) -> st.SearchStrategy[object]:
    declaration = KEYS[key]
    if declaration.kind == "choice":
        return st.sampled_from(declaration.choices)
    if declaration.kind in ("integer", "number"):
        bounds, whole = declaration.range, declaration.kind == "integer"
        low, high = bounds.low or 0, min(bounds.high or 10**6, 10**6)
        values = st.integers(int(low), int(high)) if whole else st.floats(low, high).filter(bounds.holds)
        return values | st.none() if declaration.optional else values
    return _SETTING[declaration.kind]


_LEAVES = [key for key in KEYS if KEYS[key].section is None]


@st.composite
def _configs(draw: st.DrawFn) -> Config:
    """The least config with a few of its keys changed."""
    values: dict[str, dict[str, object]] = {
        "": {"base": "tiny"},
        "data": {"train": "x"},
        "training": {},
        "training.lora": {},
        "training.rope_scaling": {},
    }
    for key in draw(st.lists(st.sampled_from(_LEAVES), max_size=6, unique=True)):
        section, _, name = key.rpartition(".")
        values[section][name] = draw(_drawn(key))
    lora = LoraConfig(**values["training.lora"])  # type: ignore[arg-type]
    rope = RopeScalingConfig(**values["training.rope_scaling"])  # type: ignore[arg-type]
    training = TrainingConfig(**values["training"], lora=lora, rope_scaling=rope)  # type: ignore[arg-type]
    return Config(**values[""], data=DataConfig(**values["data"]), training=training)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(_configs())
def test_a_config_written_out_loads_again_as_it_was(config: Config) -> None:
    try:
        again = parse_config(dump_config(config), "soup.yaml").config
    except ConfigError as error:
        # Values drawn apart may contradict each other, and a text may name no reward; nothing else may be wrong.
        codes = {problem.code for problem in error.problems if "-no-" not in problem.code}
        codes = {code for code in codes if not code.startswith("streaming-")}
        drawn = {"missing-key", "unknown-reward", "bad-pattern", "unknown-column"}
        assert codes <= {"contradiction", "key-without-effect", *drawn}
        # Hypothesis fails the test where most of what is drawn ends here.
        reject()
    lora = evolve(config.training.lora, use_olora=False, init_strategy=again.training.lora.init_strategy)
    assert again == evolve(config, training=evolve(config.training, lora=lora))
    assert list(again.training.lora.rank_pattern) == list(lora.rank_pattern)
    assert parse_config(dump_config(again), "soup.yaml").config == again


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\n\t"), min_size=1).filter(
        str.strip
    )
)
def test_a_chat_template_survives_writing_out(template: str) -> None:
    config = Config(base="tiny", data=DataConfig(train="x.jsonl", chat_template=template))
    assert parse_config(dump_config(config), "soup.yaml").config == config


def test_a_dump_leaves_the_pattern_out_that_no_reward_looks_for() -> None:
    text = "base: x\ntask: grpo\ndata: {train: a.jsonl}\ntraining: {rewards: [%s]}\n"
    for rewards, there in (("./r.py:one", False), ("format", True)):
        config = parse_config(text % rewards, "soup.yaml").config
        assert ("answer_pattern" in dump_config(config)) == there
        assert parse_config(dump_config(config), "soup.yaml").config == config
