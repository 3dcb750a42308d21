"""`soupx cache`: the tokenized rows that are kept for the next start."""

from __future__ import annotations

import json

import click

from soup_xb.cli.options import json_option


@click.command()
@click.option("--clear", is_flag=True, help="Delete all of them; runs that read them go on.")
@json_option
def command(clear: bool, as_json: bool) -> None:
    """Show the tokenized rows that are kept for the next start, or delete them."""
    from soup_xb.core.disk import user_cache
    from soup_xb.core.text import bytes_text
    from soup_xb.data import token_cache

    folder = user_cache("tokens")
    entries, size = token_cache.cache_size(folder)
    if clear:
        token_cache.clear(folder)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "entries": entries, "bytes": size, "cleared": clear}))
        return
    largest = bytes_text(token_cache.LARGEST_BYTES)
    click.echo(
        f"{folder}: {entries} entries, {bytes_text(size)}" + (", now deleted" if clear else f" of {largest}")
    )
