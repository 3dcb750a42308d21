"""`soupx doctor`: what this machine offers."""

from __future__ import annotations

import json
from typing import Any

import click

from soup_xb.cli.options import json_option


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Show versions, backends, devices, and how fast a float32 product is on each."""
    from soup_xb.runs.doctor import examine

    found = examine()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"python    {found['python']} on {found['platform']}, {found['processors']} processors")
    for name in ("torch", "mlx"):
        click.echo(_backend(name, found[name]))
    if not found["bitsandbytes"]:
        click.echo(
            'bitsandbytes  not installed (for `quantization` on torch): pip install "soup-xb[quantization]"'
        )
    click.echo("packages  " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()))


def _backend(name: str, facts: dict[str, Any] | None) -> str:
    if facts is None:
        return f'{name:9} not installed: pip install "soup-xb[{name}]"'
    blas = f"; BLAS: {facts['blas']} ({facts['blas_reason']})" if "blas" in facts else ""
    devices = "".join(f"; CUDA {index}: {one}" for index, one in enumerate(facts.get("cuda_names", ())))
    talking = ", ".join(facts["distributed"]) or "none"
    return (
        f"{name:9} {facts['device']}{devices}; {facts['gflops_float32']} GFLOP/s in float32{blas}\n"
        f"{'':9} several processes: {talking}"
    )
