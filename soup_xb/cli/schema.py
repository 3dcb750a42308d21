"""`soupx schema`: the JSON Schema of the config."""

from __future__ import annotations

import json

import click


@click.command()
def command() -> None:
    """Print the JSON Schema of soup.yaml, for editors.

    Save it and begin soup.yaml with `# yaml-language-server: $schema=soup.schema.json`.
    """
    from soup_xb.core.config.pages import config_schema

    click.echo(json.dumps(config_schema(), indent=2))
