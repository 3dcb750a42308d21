"""A template copied for a person: its text with other values, every comment kept, and the files of its sample rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from soup_xb.core.config.keys import safe_text
from soup_xb.core.config.load import parse_config
from soup_xb.core.config.run_rules import is_local_path
from soup_xb.core.config.yaml import write_yaml
from soup_xb.core.errors import ConfigError
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.files import read_object_line
from soup_xb.core.rows.formats.detect import detect_format, to_example
from soup_xb.core.rows.formats.every import formats_named
from soup_xb.core.tasks import TASKS
from soup_xb.core.templates import Template, describe_template, load_sample

# `key: value  # comment`, the value on the same line.
_LINE = re.compile(r"(?P<start> *[a-z_]+: +)(?P<value>[^#]*?)(?P<space> *)(?P<comment>#.*)?")


def with_values(text: str, values: Mapping[str, Any], source: str) -> str:
    r"""The text with the values of some dotted keys replaced, where it writes them on one line each.

    Keys that the text does not write stay as they are. Raises ConfigError where the result would not be a
    config, or a value that is written in another way.

    >>> text = "base: tiny  # small\ndata:\n  train: rows.jsonl\n"
    >>> with_values(text, {"base": "large"}, "soup.yaml").splitlines()[0]
    'base: large # small'
    """
    lines = text.split("\n")
    written = parse_config(text, source).written
    for key, value in values.items():
        if key not in written:
            continue
        match = _LINE.fullmatch(lines[written[key] - 1])
        if match is None or not match["value"]:
            message = f"`{key}` is not written on one line, so it cannot be changed here"
            raise ConfigError("template-edit", message, where=f"{source}:{written[key]}")
        lines[written[key] - 1] = _line(match, value)
    edited = "\n".join(lines)
    parse_config(edited, source)
    return edited


def sample_path(text: str, source: str) -> Path:
    """Where the sample rows of a template belong: its `data.train`, relative to the current directory.

    Raises ConfigError where that is not one relative path that stays below the current directory, whatever
    links lie on the way: a template decides which file is written, so it must not reach others.
    """
    train = parse_config(text, source).config.data.train
    path = Path(train[0])
    inside = path.parts and not path.is_absolute() and ".." not in path.parts
    here = Path.cwd().resolve()
    if len(train) != 1 or not is_local_path(train[0]) or not inside or here not in path.resolve().parents:
        raise ConfigError(
            "template-data",
            f"sample rows cannot be written to `data.train`: {safe_text(', '.join(train))}",
            where=source,
            help="they go to one path below the current directory; leave `--with-data` out.",
        )
    return path


def _line(match: re.Match[str], value: Any) -> str:
    """The line with another value; the comment keeps its column where the value leaves room for it."""
    shown = write_yaml({"x": value}).removeprefix("x: ").rstrip("\n")
    if not match["comment"]:
        return f"{match['start']}{shown}"
    width = len(match["value"]) + len(match["space"]) - 1
    return f"{match['start']}{shown:{max(width, 1)}} {match['comment']}"


# Sample rows are few; so are their files.
MOST_FILES = 64


def load_sample_files(name: str, folder: Path | None = None) -> dict[str, bytes]:
    """The pictures or sounds that the sample rows name: name as the rows write it -> content; empty for text.

    They lie in `data/NAME/` and nowhere else. Raises ConfigError for more than 64 of them and for any other name, and
    as a TemplateFolder does.
    """
    template = describe_template(name, folder)
    if not TASKS[template.task].media:
        return {}
    names = list(dict.fromkeys(_named_files(load_sample(name, folder), template)))
    if len(names) > MOST_FILES:
        raise ConfigError(
            "template-data",
            f"the sample rows name {len(names)} files, at most {MOST_FILES} are allowed",
            where=str(template.folder.path),
        )
    return {one: template.folder.read_bytes(f"data/{one}") for one in names}


def _named_files(text: str, template: Template) -> Iterator[str]:
    task = TASKS[template.task]
    formats = formats_named(task.formats, task.media)
    for number, line in enumerate(text.splitlines(), 1):
        source = Source(f"data/{template.name}.jsonl", number)
        row = read_object_line(line, source)
        example = to_example(row, source, detect_format([(source, row)], formats).name, formats)
        for attachment in getattr(example, "attachments", ()):
            if not attachment.name.startswith(f"{template.name}/"):
                raise ConfigError(
                    "template-data",
                    f"`{safe_text(attachment.name)}` does not lie in the template's own folder `{template.name}/`",
                    where=str(source),
                )
            yield attachment.name


def media_path(rows: Path, name: str) -> Path:
    """Where a picture or sound of sample rows belongs, `rows` being their own place below the current directory.

    Raises ConfigError where a link on the way leads out of the folder of the rows.
    """
    path, folder = rows.parent / name, rows.parent.resolve()
    if folder not in path.resolve().parents:
        message = f"the sample file `{safe_text(name)}` cannot be written there"
        raise ConfigError(
            "template-data", message, where=str(rows.parent), help="a link leads out of the folder."
        )
    return path
