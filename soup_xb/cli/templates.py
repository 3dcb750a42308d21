"""`soupx templates`: the starter configs, and the text of one."""

from __future__ import annotations

import json
from pathlib import Path

import click

from soup_xb.cli.options import json_option
from soup_xb.core.templates import Template, list_templates, load_template


@click.command()
@click.argument("name", required=False)
@click.option("--templates-dir", type=click.Path(path_type=Path), help="Use this folder of templates alone.")
@json_option
def command(name: str | None, templates_dir: Path | None, as_json: bool) -> None:
    """List the starter configs, or show the one called NAME.

    Your own stand in a folder with a manifest.json, named by --templates-dir, or in soupx/templates below
    $XDG_CONFIG_HOME (~/.config; on a Mac ~/Library/Application Support).
    """
    templates = list_templates(templates_dir)
    if name is not None:
        text = load_template(name, templates_dir)
        shown = next(template for template in templates if template.name == name)
        click.echo(json.dumps({**_plain(shown), "text": text}, indent=2) if as_json else text, nl=as_json)
    elif as_json:
        click.echo(json.dumps({"templates": [_plain(template) for template in templates]}, indent=2))
    else:
        _show(templates)


def _plain(template: Template) -> dict[str, object]:
    return {
        "name": template.name,
        "description": template.description,
        "task": template.task,
        "backends": list(template.backends),
        "from": template.folder.owner,
    }


def _show(templates: tuple[Template, ...]) -> None:
    width = max((len(template.name) for template in templates), default=0)
    for template in templates:
        backends = ", ".join(template.backends)
        owner = " · yours" if template.folder.owner == "yours" else ""
        click.echo(f"{template.name:{width}}  {template.description} ({template.task} · {backends}{owner})")
    click.echo("\nsoupx templates NAME shows one, soupx init --template NAME writes it.")
