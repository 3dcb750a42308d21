"""A base's name -> a local folder: a folder as it is, a hub id through the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from soup_xb.core.disk import local_path
from soup_xb.core.errors import ModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
# What a base needs and nothing that can run: no pickles, no code.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def resolve_base(name: str) -> Path:
    """The local folder of a base.

    A hub id is taken from the hub's cache where it is whole, and downloaded otherwise. Raises ModelError for
    a folder that is not there and for a hub id that is neither cached nor reachable.
    """
    folder = local_path(name)
    try:
        if folder.is_dir():
            return folder
        what = "is not a folder" if folder.exists() else "no such folder, and not a hub id"
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    if not _HUB_ID.fullmatch(name) or not what.startswith("no such"):
        raise ModelError(
            "base-not-found",
            f"`{name}`: {what}",
            where="base",
            help="name a model folder, or a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`.",
        )
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            "base-not-on-hub",
            f"the hub refused `{name}`: {str(error).splitlines()[0]}",
            where="base",
            help="check the name; for a gated base log in with `hf auth login`.",
        ) from error
    except OSError as error:
        raise ModelError(
            "base-not-cached",
            f"`{name}` is not in the hub's cache, and the hub cannot be reached",
            where="base",
            help=f"fetch it where there is a network: `hf download {name}`, or name a local folder.",
        ) from error
