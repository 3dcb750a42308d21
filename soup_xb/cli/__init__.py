"""The `soupx` command: the group, its lazy commands, and the one place where errors become exit codes."""

from soup_xb.cli.main import run

__all__ = ["run"]
