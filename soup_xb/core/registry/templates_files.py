"""The pictures and sounds of a template's sample rows: read inside its folder, written beside the rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from soup_xb.core.config.schema import MEDIA_TASKS
from soup_xb.core.errors import ConfigError
from soup_xb.core.keys.config_values import safe_text
from soup_xb.core.registry.templates_manifest import Template
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.formats.detect import detect_format, to_example
from soup_xb.core.rows.formats.every import formats_of
from soup_xb.core.rows.json_rows import read_object_line
from soup_xb.core.templates import describe_template, load_sample

# Sample rows are few; so are their files.
MOST_FILES = 64


def load_sample_files(name: str, folder: Path | None = None) -> dict[str, bytes]:
    """The pictures or sounds that the sample rows name: name as the rows write it -> content; empty for text.

    They lie in `data/NAME/` and nowhere else. Raises ConfigError for more than 64 of them and for any other name, and
    as a TemplateFolder does.
    """
    template = describe_template(name, folder)
    if template.task not in MEDIA_TASKS:
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
    formats = formats_of(template.task)
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
