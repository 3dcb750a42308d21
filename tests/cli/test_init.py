"""`soupx init` and `soupx templates`: what is written, what is never overwritten, and the questions on a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from soup_xb.cli.init import bases_for
from soup_xb.core.config.load import load_config, parse_config
from soup_xb.core.templates import list_templates, load_sample, load_template, shipped_folder

Soupx = Callable[..., Any]
NAMES = [template.name for template in list_templates(shipped_folder())]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, and no templates of one's own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_template_is_written_as_it_is_and_passes_the_check(place: Path, soupx: Soupx, name: str) -> None:
    answer = soupx("init", "--template", name, "--output", "mine.yaml")
    assert answer.code == 0, answer.err
    assert answer.out == ""
    assert (place / "mine.yaml").read_text() == load_template(name)
    assert soupx("check", "mine.yaml").code == 0


def test_sample_rows_go_where_the_config_reads_them(place: Path, soupx: Soupx) -> None:
    answer = soupx("init", "--template", "chat", "--with-data")
    assert answer.code == 0, answer.err
    assert "next: soupx train\n" in answer.err
    train = load_config(Path("soup.yaml")).config.data.train[0]
    assert Path(train).read_text() == load_sample("chat")
    assert soupx("data", train).code == 0


def test_the_schema_stands_where_the_first_line_says(place: Path, soupx: Soupx) -> None:
    soupx("init", "--template", "chat", "--output", "deep/soup.yaml")
    first = (place / "deep" / "soup.yaml").read_text().splitlines()[0]
    schema = place / "deep" / first.removeprefix("# yaml-language-server: $schema=")
    assert json.loads(schema.read_text()) == json.loads(soupx("schema").out)


def test_a_schema_of_another_version_stays_and_is_told(place: Path, soupx: Soupx) -> None:
    (place / "soup.schema.json").write_text("{}")
    answer = soupx("init", "--template", "chat")
    assert answer.code == 0
    assert "soupx schema > soup.schema.json" in answer.err
    assert (place / "soup.schema.json").read_text() == "{}"


@pytest.mark.parametrize("standing", ["soup.yaml", "data/chat.jsonl"])
def test_nothing_is_overwritten_and_nothing_is_written_beside_it(
    place: Path, soupx: Soupx, standing: str
) -> None:
    (place / "data").mkdir()
    (place / standing).write_text("mine")
    answer = soupx("init", "--template", "chat", "--with-data")
    assert answer.code == 2
    assert answer.err.startswith(f"error[file-exists] {standing}: ")
    assert "--force" in answer.err
    assert [path for path in place.rglob("*") if path.is_file()] == [place / standing]
    assert (place / standing).read_text() == "mine"
    assert soupx("init", "--template", "chat", "--with-data", "--force").code == 0
    assert (place / standing).read_text() != "mine"


def test_a_link_is_not_written_through(place: Path, soupx: Soupx) -> None:
    (place / "soup.yaml").symlink_to(place / "elsewhere")
    assert soupx("init", "--template", "chat").code == 2
    assert soupx("init", "--template", "chat", "--force").code == 0
    assert not (place / "elsewhere").exists()


def test_a_folder_in_the_way_is_told_even_with_force(place: Path, soupx: Soupx) -> None:
    (place / "soup.yaml").mkdir()
    answer = soupx("init", "--template", "chat", "--force")
    assert (answer.code, answer.err.split(":")[0]) == (2, "error[output-is-folder] soup.yaml")


def test_a_file_in_the_place_of_a_folder_exits_7(place: Path, soupx: Soupx) -> None:
    (place / "data").write_text("mine")
    answer = soupx("init", "--template", "chat", "--output", "data/soup.yaml")
    assert answer.code == 7
    assert "Traceback" not in answer.err


def test_an_unknown_template_asks_for_the_near_one(soupx: Soupx) -> None:
    answer = soupx("init", "--template", "caht")
    assert answer.code == 2
    assert answer.err.startswith("error[template-unknown] no such template: `caht`")
    assert "did you mean `chat`?" in answer.err


def test_without_a_terminal_a_template_must_be_named(soupx: Soupx) -> None:
    answer = soupx("init")
    assert answer.code == 2
    assert "error[template-not-named]" in answer.err
    assert all(name in answer.err for name in NAMES)


@pytest.mark.parametrize(
    "train",
    ["/tmp/rows.jsonl", "../rows.jsonl", "link/rows.jsonl", "[a.jsonl, b.jsonl]", "tatsu/rows"],
)
def test_sample_rows_of_a_foreign_template_stay_below_the_current_directory(
    place: Path, soupx: Soupx, own: Callable[[str], Path], train: str
) -> None:
    (place.parent / "out").mkdir()
    (place / "link").symlink_to(place.parent / "out")
    folder = own(f"base: tiny\ndata:\n  train: {train}\n")
    answer = soupx("init", "--template", "mine", "--with-data", "--templates-dir", folder)
    assert answer.code == 2
    assert "error[template-data]" in answer.err
    assert sorted(path.name for path in place.iterdir()) == ["link"]
    assert list((place.parent / "out").iterdir()) == []


@pytest.fixture
def own(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder that holds one template, `mine`, of this text."""
    import hashlib

    def make(text: str) -> Path:
        folder = tmp_path / "own"
        (folder / "data").mkdir(parents=True)
        (folder / "mine.yaml").write_text(text)
        (folder / "data" / "mine.jsonl").write_text('{"text": "a row"}\n')
        entry = {
            "file": "mine.yaml",
            "description": "Mine.",
            "task": "sft",
            "backends": ["torch"],
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        (folder / "manifest.json").write_text(json.dumps({"version": 1, "templates": {"mine": entry}}))
        return folder

    return make


def test_a_folder_of_ones_own_is_listed_shown_and_used(
    place: Path, soupx: Soupx, own: Callable[[str], Path]
) -> None:
    folder = own("base: tiny\ndata:\n  train: rows.jsonl\n")
    assert soupx("templates", "--templates-dir", folder).out.startswith("mine  Mine. (sft · torch · yours)\n")
    assert soupx("templates", "mine", "--templates-dir", folder).out == (folder / "mine.yaml").read_text()
    assert soupx("init", "--template", "mine", "--with-data", "--templates-dir", folder).code == 0
    assert (place / "rows.jsonl").is_file()
    assert soupx("templates", "chat", "--templates-dir", folder).code == 2


def test_a_tampered_folder_exits_2(soupx: Soupx, own: Callable[[str], Path]) -> None:
    folder = own("base: tiny\n")
    (folder / "mine.yaml").write_text("base: other\n")
    for words in (["templates", "mine"], ["init", "--template", "mine"]):
        answer = soupx(*words, "--templates-dir", folder)
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.startswith("error[template-changed]")


def test_templates_are_listed_and_shown(soupx: Soupx) -> None:
    listed = soupx("templates")
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines()[: len(NAMES)]] == NAMES
    assert soupx("templates", "code").out == load_template("code")
    found = json.loads(soupx("templates", "--json").out)["templates"]
    assert [entry["name"] for entry in found] == NAMES
    assert set(found[0]) == {"name", "description", "task", "backends", "from"}
    assert json.loads(soupx("templates", "code", "--json").out)["text"] == load_template("code")


def on_a_terminal(place: Path, *answers: str) -> tuple[int, str]:
    """Exit code and screen of `soupx init` on a terminal, each question answered when its prompt stands there."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "soup_xb", "init"]
    process = subprocess.Popen(command, cwd=place, stdin=slave, stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)
    screen, waiting, deadline = "", [*answers], time.monotonic() + 60
    asked = 0
    while time.monotonic() < deadline:
        ready, _, _ = select.select([master], [], [], 0.2)
        if ready:
            try:
                screen += os.read(master, 4096).decode()
            except OSError:
                break
        elif process.poll() is not None:
            break
        if waiting and screen.rstrip(" ").endswith(":") and len(screen) > asked:
            os.write(master, waiting.pop(0).encode())
            asked = len(screen) + 1
    os.close(master)
    return process.wait(timeout=30), screen


def test_the_questions_end_in_a_file_and_the_next_command(place: Path) -> None:
    code_template = [template.name for template in list_templates(shipped_folder())].index("code") + 1
    code, screen = on_a_terminal(place, f"{code_template}\n", "\n", "2\n", "3\n")
    assert code == 0, screen
    assert "next: soupx train\r\n" in screen
    loaded = load_config(place / "soup.yaml").config
    assert loaded.base == "Qwen/Qwen3-4B-Instruct-2507"
    assert (loaded.training.quantization, loaded.training.batch_size) == ("4bit", 1)
    assert (place / "data" / "code.jsonl").read_text() == load_sample("code")
    assert "# The model to start from" in (place / "soup.yaml").read_text()


def test_enter_alone_makes_a_chat_model(place: Path) -> None:
    code, screen = on_a_terminal(place, "\n", "\n", "\n", "\n")
    assert code == 0, screen
    assert (place / "data" / "chat.jsonl").read_text() == load_sample("chat")


def test_a_small_machine_takes_the_rows_of_a_step_one_at_a_time(place: Path) -> None:
    templates = [template.name for template in list_templates(shipped_folder())]
    code, screen = on_a_terminal(place, f"{templates.index('dpo') + 1}\n", "\n", "2\n", "2\n")
    assert code == 0, screen
    training = load_config(place / "soup.yaml").config.training
    usual = parse_config(load_template("dpo"), "dpo.yaml").config.training
    rows = usual.batch_size * usual.gradient_accumulation_steps
    assert (training.batch_size, training.gradient_accumulation_steps) == (1, rows)


def test_plain_text_is_learned_by_a_base_that_is_no_chat_model(place: Path) -> None:
    templates = [template.name for template in list_templates(shipped_folder())]
    code, screen = on_a_terminal(place, f"{templates.index('pretrain') + 1}\n", "\n", "3\n", "\n")
    assert code == 0, screen
    offered = screen[screen.index("Which base?") :]
    assert offered.count("-Base (") == 3
    assert not any(word in offered for word in ("Instruct", "Qwen3-1.7B ("))
    assert load_config(place / "soup.yaml").config.base == "Qwen/Qwen3-1.7B-Base"


@pytest.mark.parametrize("name", NAMES)
def test_a_template_s_own_base_is_among_those_that_are_offered(name: str) -> None:
    template = next(one for one in list_templates(shipped_folder()) if one.name == name)
    base = parse_config(load_template(name), name).config.base
    assert base in bases_for(template)
    # One of a person's own is offered what suits its task, whatever its name.
    assert name == "moe" or base in bases_for(evolve(template, name="mine"))


def test_pictures_are_not_cut_off_on_a_small_machine(place: Path) -> None:
    templates = [template.name for template in list_templates(shipped_folder())]
    code, screen = on_a_terminal(place, f"{templates.index('vision') + 1}\n", "\n", "4\n", "\n")
    assert code == 0, screen
    usual = parse_config(load_template("vision"), "vision.yaml").config
    config = load_config(place / "soup.yaml").config
    assert (config.data.max_length, config.training.batch_size) == (usual.data.max_length, 1)


def test_an_embedding_model_keeps_the_rows_that_are_told_from_each_other(place: Path) -> None:
    templates = [template.name for template in list_templates(shipped_folder())]
    code, screen = on_a_terminal(place, f"{templates.index('embedding') + 1}\n", "\n", "4\n", "\n")
    assert code == 0, screen
    loaded, usual = (
        load_config(place / "soup.yaml"),
        parse_config(load_template("embedding"), "embedding.yaml"),
    )
    assert loaded.config == usual.config


def test_ones_own_rows_and_base_are_put_into_the_file(place: Path) -> None:
    (place / "rows: mine.csv").write_text("text\nhello\n")
    code, screen = on_a_terminal(
        place, "\n", "none.csv\n", "rows: mine.csv\n", "4\n", "5\n", "models/my base\n"
    )
    assert code == 0, screen
    assert "there is no file none.csv" in screen
    assert "next: soupx data 'rows: mine.csv'" in screen
    loaded = load_config(place / "soup.yaml").config
    assert (loaded.base, loaded.data.train) == ("models/my base", ("rows: mine.csv",))
    assert (loaded.data.format, loaded.data.max_length) == ("auto", 512)
    assert not (place / "data").exists()


def test_stopping_in_the_middle_of_the_questions_writes_nothing(place: Path) -> None:
    code, screen = on_a_terminal(place, "1\n", "\x04")
    assert code == 130
    assert "nothing was written" in screen
    assert list(place.iterdir()) == []
