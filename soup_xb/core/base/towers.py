"""The parts of a multimodal base that see pictures or sound alone: no row of text runs through them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from soup_xb.core.errors import Problem

_TOWER = re.compile(r"(^|[._])(vision|visual|audio|image|speech|multi_modal|multimodal|mm)([._]|$)")
_SIGHT = re.compile(r"(^|[._])(vision|visual|image)([._]|$)")
_HEARING = re.compile(r"(^|[._])(audio|speech)([._]|$)")


def is_in_tower(name: str) -> bool:
    """Whether a module is in a vision or audio tower, or in the projector behind one.

    >>> is_in_tower("model.vision_tower.layers.0.q_proj"), is_in_tower("model.language_model.layers.0.q_proj")
    (True, False)
    """
    return bool(_TOWER.search(name))


def is_unseen(name: str, media: str = "") -> bool:
    """Whether rows with this kind of media (image, audio, empty for text alone) leave the module without a gradient.

    >>> is_unseen("model.vision_tower.layers.0.q_proj"), is_unseen("model.vision_tower.layers.0.q_proj", "image")
    (True, False)
    >>> is_unseen("model.audio_tower.layers.0.q_proj", "image"), is_unseen("multi_modal_projector.linear_1", "image")
    (True, False)
    """
    if not media:
        return is_in_tower(name)
    return bool((_HEARING if media == "image" else _SIGHT).search(name))


def without_gradient(names: Sequence[str], where: str, media: str = "") -> list[Problem]:
    """What to know of adapted modules that training on rows with this kind of media leaves as they start.

    The code is `towers-alone` where there is no other module, so that nothing would be trained.
    """
    unseen = sum(is_unseen(name, media) for name in names)
    if not unseen:
        return []
    kind = f"rows with {'pictures' if media == 'image' else 'sound'}" if media else "text rows"
    if unseen == len(names):
        message = (
            f"all {unseen} adapted modules are in vision and audio towers, which {kind} do not run through"
        )
        cure = "name modules of the text decoder too, or use `target_modules: auto`."
        return [Problem("towers-alone", message, where, cure)]
    message = (
        f"{unseen} adapted modules in the vision and audio towers get no gradient from {kind} "
        "and stay as they start"
    )
    cure = "leave them out with `target_modules: auto`, the text decoder alone, or with a narrower pattern."
    return [Problem("no-gradient", message, where, cure)]
