"""The backends by name; the only place that imports one, and only when it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import platform

from soup_xb.core.config import support
from soup_xb.core.config.load import LoadedConfig
from soup_xb.core.run.session import Session, SessionSettings


def choose_backend(loaded: LoadedConfig) -> tuple[str, str]:
    """The backend that runs the file, with the reason.

    Raises ConfigError when it is not installed, and with every refusal of the file at once.
    """
    name, reason = support.choose_backend(
        loaded, system=platform.system(), machine=platform.machine(), installed=is_installed
    )
    support.check_supported(loaded, name)
    return name, reason


def available_backend(asked: str) -> str:
    """The backend for work that no config describes; `auto` is mlx on Apple silicon where installed, else torch.

    Raises ConfigError when it is not installed.
    """
    return support.available_backend(
        asked, system=platform.system(), machine=platform.machine(), installed=is_installed
    )[0]


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def open_session(backend: str, settings: SessionSettings) -> Session:
    """Open a base on the named backend.

    Raises ModelError for a base that the backend cannot read, ResourceError where memory does not suffice.
    """
    session: Session = importlib.import_module(f"soup_xb.backends.{backend}.session").open_session(settings)
    return session
