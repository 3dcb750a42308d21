"""The parts of a multimodal base that see pictures or sound alone: no row of text runs through them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from soup_xb.core.errors import Problem

_TOWER = re.compile(r"(^|[._])(vision|visual|audio|image|speech|multi_modal|multimodal|mm)([._]|$)")


def is_in_tower(name: str) -> bool:
    """Whether a module is in a vision or audio tower, or in the projector behind one.

    >>> is_in_tower("model.vision_tower.layers.0.q_proj"), is_in_tower("model.language_model.layers.0.q_proj")
    (True, False)
    """
    return bool(_TOWER.search(name))


def without_gradient(names: Sequence[str], where: str) -> list[Problem]:
    """What to know of adapted modules that training on text leaves as they start.

    The code is `towers-alone` where there is no other module, so that nothing would be trained.
    """
    towers = sum(map(is_in_tower, names))
    if not towers:
        return []
    if towers == len(names):
        message = f"all {towers} adapted modules are in vision and audio towers, which rows of text do not run through"
        cure = "name modules of the text decoder too, or use `target_modules: auto`."
        return [Problem("towers-alone", message, where, cure)]
    message = (
        f"{towers} adapted modules in the vision and audio towers get no gradient from text rows "
        "and stay as they start"
    )
    cure = "leave them out with `target_modules: auto`, the text decoder alone, or with a narrower pattern."
    return [Problem("no-gradient", message, where, cure)]
