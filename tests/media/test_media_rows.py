"""How rows with pictures and sounds are written, and what is refused by row and place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from media_bases import save_picture, save_tone

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import Attachment, Source
from soup_xb.core.rows.formats.detect import ExampleReader
from soup_xb.core.rows.formats.every import formats_named
from soup_xb.core.tasks import TASKS

CAT, DOG = Attachment("image", "cat.png"), Attachment("image", "dog.png")


def read(row: dict[str, Any], task: str = "vision") -> Any:
    formats = formats_named(TASKS[task].formats, TASKS[task].media)
    (example,) = ExampleReader(iter([(Source("rows.jsonl", 4), row)]), "auto", "rows.jsonl", formats)
    return example


def turns(*parts: Any, **columns: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": "Yes."}
    return {"messages": [{"role": "user", "content": list(parts)}, answer], **columns}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def llava(words: str, **columns: Any) -> dict[str, Any]:
    talk = [{"from": "human", "value": words}, {"from": "gpt", "value": "Yes."}]
    return {"conversations": talk, **columns}


@pytest.mark.parametrize(
    "row",
    [
        turns({"type": "image", "path": "cat.png"}, text("Alike?"), {"type": "image", "image": "dog.png"}),
        turns({"type": "image"}, text("Alike?"), {"type": "image"}, images=["cat.png", {"path": "dog.png"}]),
        llava("<image>\nAlike?\n<image>", image=["cat.png", "dog.png"]),
        llava("<image>Alike?<image>", images=["cat.png", "dog.png"]),
        # As tables hold them: JSON text, an object of lists, the nulls of a common schema.
        llava("<image>Alike?<image>", images='["cat.png", "dog.png"]', image=None),
        llava("<image>Alike?<image>", images={"path": ["cat.png", "dog.png"], "bytes": [None, None]}),
        {
            "conversations": json.dumps(llava("<image>Alike?<image>")["conversations"]),
            "images": ["cat.png", "dog.png"],
        },
        turns(
            {"type": "image", "path": "cat.png", "text": None},
            text("Alike?"),
            {"type": "image", "path": "dog.png"},
        ),
        {
            "messages": [
                {"role": None, "content": None, "from": "human", "value": "<image>Alike?<image>"},
                {"role": None, "content": None, "from": "gpt", "value": "Yes."},
            ],
            "images": ["cat.png", "dog.png"],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": {
                        "type": ["image", "text", "image"],
                        "path": ["cat.png", None, "dog.png"],
                        "text": [None, "Alike?", None],
                    },
                },
                {"role": "assistant", "content": "Yes."},
            ]
        },
    ],
)
def test_every_way_to_write_two_pictures_is_the_same_turn(row: dict[str, Any]) -> None:
    assert read(row).messages[0].parts == (CAT, "Alike?", DOG)
    assert read(row).attachments == (CAT, DOG)


def test_a_transcript_names_its_sound_and_its_language() -> None:
    example = read({"audio": "a.wav", "text": "Hallo", "language": "de"}, "audio")
    assert (example.completion, example.language) == ("Hallo", "de")
    assert example.attachments == (Attachment("audio", "a.wav"),)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (turns({"type": "image", "url": "https://example.org/a.png"}), "file-is-url"),
        (turns({"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}), "file-is-url"),
        (turns({"type": "video", "path": "a.mp4"}), "unsupported-content"),
        (turns({"type": "image"}), "missing-file"),
        (turns(text("Alike?"), images=["cat.png"]), "unplaced-file"),
        (llava("Alike?", image="cat.png"), "unplaced-file"),
        (llava("<image>Alike?"), "missing-file"),
        (turns({"type": "image", "path": 3}), "mistyped-field"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image", "path": "a.png"}]}]},
            "file-in-answer",
        ),
    ],
)
def test_a_row_that_means_nothing_is_refused_by_its_place(row: dict[str, Any], code: str) -> None:
    with pytest.raises(DataError) as error:
        read(row)
    (problem,) = error.value.problems
    assert problem.code == code
    assert problem.where.startswith("rows.jsonl:4")


SYSTEM = {"role": "system", "content": "Be short."}
TALK = {"messages": [SYSTEM, *turns(text("Hi?"))["messages"]]}
LLAVA_TALK = {"conversations": [{"from": "system", "value": "Be short."}, *llava("Hi?")["conversations"]]}


@pytest.mark.parametrize(("task", "row"), [("vision", TALK), ("audio", TALK), ("vision", LLAVA_TALK)])
def test_a_system_turn_and_a_system_column_are_one_too_many(task: str, row: dict[str, Any]) -> None:
    for column in (None, " "):
        assert [turn.role for turn in read({**row, "system": column}, task).messages][:2] == [
            "system",
            "user",
        ]
    with pytest.raises(DataError) as error:
        read({**row, "system": "Be exact."}, task)
    (problem,) = error.value.problems
    assert (problem.code, problem.where) == ("two-system-prompts", "rows.jsonl:4: system")


def test_a_system_column_alone_is_the_first_turn() -> None:
    first, *others = read(
        turns({"type": "image", "path": "cat.png"}, text("Hi?"), system="Be exact.")
    ).messages
    assert (first.role, first.content) == ("system", "Be exact.")
    assert others[0].parts == (CAT, "Hi?")


@pytest.mark.parametrize(
    ("name", "task", "row", "code"),
    [
        ("llava", "vision", turns({"type": "image", "path": "gone.png"}), "missing-file"),
        ("llava", "vision", turns({"type": "image", "path": "broken.png"}), "broken-file"),
        (
            "llava",
            "vision",
            turns(text("is <image> it?"), {"type": "image", "path": "cat.png"}),
            "file-marks",
        ),
        ("llava", "vision", turns(text("what does <image> mean?")), "file-marks"),
        ("whisper", "audio", {"audio": "long.wav", "text": "a tone"}, "broken-file"),
        ("whisper", "audio", {"audio": "a.wav", "text": "a tone", "language": "fr"}, "unknown-language"),
        ("whisper", "audio", turns({"type": "audio", "path": "a.wav"}), "conversation-for-speech"),
    ],
)
def test_the_run_ends_before_it_begins_naming_file_and_line(
    name: str, task: str, row: dict[str, Any], code: str, config: Any, soupx: Any, tmp_path: Path
) -> None:
    save_picture(tmp_path / "cat.png", (1, 2, 3))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    save_tone(tmp_path / "a.wav", 440)
    save_tone(tmp_path / "long.wav", 440, seconds=2.5)
    good = {"audio": "a.wav", "text": "a tone"} if "audio" in row else turns(text("Hi?"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    done = soupx("train", config(name, task, rows))
    assert done.code == 3, done.err
    assert f"error[{code}]" in done.err
    assert "rows.jsonl:" in done.err


def test_a_language_is_written_before_the_transcript(config: Any, opened: Any, tmp_path: Path) -> None:
    save_tone(tmp_path / "a.wav", 440)
    rows = tmp_path / "rows.jsonl"
    told = ({"text": "ein Ton", "language": "german"}, {"text": "a tone"})
    rows.write_text("".join(json.dumps({"audio": "a.wav"} | one) + "\n" for one in told))
    with opened(config("whisper", "audio", rows)) as run:
        shown = [run.tokenizer.decode(row.sequences[0].tokens, special=True) for row in run.plan.rows]
    assert shown == [
        "<|startoftranscript|><|de|><|transcribe|><|notimestamps|>ein Ton<|endoftext|>",
        "<|startoftranscript|><|notimestamps|>a tone<|endoftext|>",
    ]


def test_mlx_and_packing_are_refused(pictures: Path, config: Any, soupx: Any) -> None:
    file = config("llava", "vision", pictures)
    refused = soupx("check", file, "--backend", "mlx")
    assert refused.code == 2
    assert "not its vision encoder" in refused.err
    packed = soupx("check", file, "--set", "data.packing=true")
    assert packed.code == 2
    assert "one row a sequence" in packed.err
