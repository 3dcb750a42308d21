"""A base's processor: transformers' own, opened without its video part and with pictures on PIL."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from soup_xb.core.base.folder import read_object
from soup_xb.core.disk import foreign_errors
from soup_xb.core.errors import ModelError

# In the order in which AutoProcessor asks them for the processor's class.
CONFIG_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
# What an adapter's folder keeps of its base's processor, beside the tokenizer.
KEPT_FILES = (*CONFIG_FILES[:2], "video_preprocessor_config.json", "chat_template.json")


def open_processor(base: Path) -> Any:
    """The processor in a local folder. No code in the folder is run and nothing is fetched.

    A video processor is left out: rows hold no videos, and it insists on torchvision. Raises ModelError for a folder
    without a processor, a class that transformers does not have, and a part that cannot be opened.
    """
    kind = _processor_class(base)
    with foreign_errors(partial(_unusable, base)):
        parts = [_part(base, name) for name in kind.get_attributes()]
        settings, _ = kind.get_processor_dict(str(base), local_files_only=True)
        return _without_video(kind).from_args_and_dict(parts, settings)


def is_processor_folder(folder: Path) -> bool:
    """Whether a folder holds a processor's settings, as that of an adapter for pictures or sounds does."""
    return any((folder / name).is_file() for name in CONFIG_FILES[:2])


def task_of_processor(base: Path) -> str:
    """The task whose files the base's processor takes: vision where it sees, else audio."""
    return "vision" if "image_processor" in _processor_class(base).get_attributes() else "audio"


def _processor_class(base: Path) -> Any:
    import transformers
    from transformers import PROCESSOR_MAPPING, AutoConfig, ProcessorMixin

    named = [_settings(base / name).get("processor_class") for name in CONFIG_FILES]
    name = next((one for one in named if isinstance(one, str)), "")
    kind = getattr(transformers, name, None) if name else None
    if kind is None:
        with foreign_errors(partial(_unusable, base)):
            config = AutoConfig.from_pretrained(str(base), trust_remote_code=False, local_files_only=True)
        kind = PROCESSOR_MAPPING.get(type(config), None)
    if not isinstance(kind, type) or not issubclass(kind, ProcessorMixin):
        told = f"`{name[:80]}`, which transformers does not have" if name else "none in it"
        raise ModelError(
            "no-processor",
            f"the base needs a processor, and there is {told}",
            where=str(base),
            help="take a base that has a processor_config.json or preprocessor_config.json of a class in transformers.",
        )
    if "audio_tokenizer" in _settings(base / CONFIG_FILES[0]):
        raise ModelError(
            "no-processor",
            "its processor wants a second model for its sounds (`audio_tokenizer`), which is not opened here",
            where=str(base / CONFIG_FILES[0]),
            help="take a base that hears by itself.",
        )
    return kind


def _settings(file: Path) -> Mapping[str, Any]:
    return read_object(file, "base-config") if file.is_file() else {}


def _part(base: Path, name: str) -> Any:
    """The processor's part of this name (tokenizer, image_processor, feature_extractor), None for videos."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    folder = str(base)
    if name == "tokenizer":
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if name == "image_processor":
        # PIL and torchvision scale a picture to slightly other pixels; one of them is on every machine.
        return AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
    if name == "feature_extractor":
        return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if name == "video_processor":
        return None
    raise ModelError(
        "no-processor",
        f"its processor has a part that is not known here: `{name}`",
        where=str(base),
        help="take a base whose processor holds a tokenizer with an image processor or a feature extractor.",
    )


def _without_video(kind: Any) -> Any:
    """The class with an empty place for a video processor, which its own check would not let pass."""

    def check(self: Any, name: str, part: Any) -> Any:
        if name == "video_processor" and part is None:
            return None
        return kind.check_argument_for_proper_class(self, name, part)

    members = {"check_argument_for_proper_class": check, "__init__": kind.__init__}
    return type(kind.__name__, (kind,), members)


def _unusable(base: Path, reason: str) -> ModelError:
    if "orchvision" in reason:
        return ModelError(
            "processor-needs-torchvision",
            "its processor scales pictures with torchvision alone",
            where=str(base),
            help="install the torchvision that fits your torch: `pip install torchvision`.",
        )
    return ModelError(
        "broken-processor",
        f"the processor cannot be opened: {reason}",
        where=str(base),
        help="download the base's processor files (processor_config.json, preprocessor_config.json) again.",
    )
