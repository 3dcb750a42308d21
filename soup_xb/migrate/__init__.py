"""Another tool's config as one of ours, with an account of every key: carried over, added, or left and why."""

from soup_xb.migrate.migration import TOOLS, Migration, migrate

__all__ = ["TOOLS", "Migration", "migrate"]
