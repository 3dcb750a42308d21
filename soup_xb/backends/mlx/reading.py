"""One config, two readings: what transformers means by a config.json, as an mlx-lm model that computes the same.

Every field of the config is accounted for: proven to be followed (soup_xb.core.base.proven), held at a value that was
equal, or of no weight. Any other is refused by name, so that a base is never trained as another model.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.nn as nn
import mlx_lm.utils
import transformers
from attrs import evolve, frozen

from soup_xb.backends.mlx.families import Weights, family_of, text_config, translate
from soup_xb.backends.mlx.rope import KINDS, ExactRope, Rope, read_rope, refused, turns_neighbours
from soup_xb.core.base.folder import BaseFolder, unknown_type
from soup_xb.core.base.layers import layer_settings
from soup_xb.core.base.model_config import padding_without_row
from soup_xb.core.base.proven import ProvenType, left_out, proven_type
from soup_xb.core.base.rope import RopeScaling
from soup_xb.core.config.support import feature_refusal
from soup_xb.core.disk import foreign_errors
from soup_xb.core.errors import ConfigError, ModelError

# Training-time dropout of the base is off on both engines; the rest is about tokens, output and bookkeeping.
WEIGHTLESS = {
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "torch_dtype",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type", "initializer_range",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp", "attention_dropout",
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "resid_dropout", "embedding_dropout",
    "residual_dropout", "hidden_dropout_prob", "classifier_dropout", "_name_or_path", "output_attentions",
    "max_window_layers", "no_rope_layer_interval", "_sliding_window_pattern", "sliding_window_pattern",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "input_jitter_noise", "model_type",
    "quantization_config", "quantization", "vision_config", "audio_config", "image_token_id", "image_token_index",
    "video_token_id", "video_token_index", "audio_token_id", "vision_start_token_id", "vision_end_token_id",
    "boi_token_id", "eoi_token_id", "boa_token_id", "boi_token_index", "eoi_token_index", "eoa_token_index",
    "mm_tokens_per_image", "vision_feature_layer", "vision_feature_select_strategy", "image_seq_length",
    "projector_hidden_act", "multimodal_projector_bias", "spatial_merge_size", "projection_hidden_size",
    "projector_hidden_size", "out_hidden_size", "merged_hidden_size", "text_config", "auto_map",
    "max_position_embeddings",
}  # fmt: skip
# What the weights' shapes follow from, so that another reading does not load; ropes and windows are looked at apart.
STRUCTURE = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "tie_word_embeddings", "rope_parameters", "sliding_window", "use_sliding_window",
    "qk_rope_head_dim", "qk_nope_head_dim", "qk_head_dim", "v_head_dim", "mamba_d_ssm", "mamba_n_heads",
    "mamba_d_head", "num_heads", "linear_num_heads", "layer_group_size", "full_attn_idxs", "moe_layers",
    "interleave_moe_layer_step", "per_layer_config",
}  # fmt: skip
# Lists of what each layer is. Where not every list is followed, a regular one is.
KINDS_OF_LAYERS = {"layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers"}


@frozen(eq=False)
class Reading:
    """A base in mlx-lm's terms: `config` in its spelling for its `module`.

    `text` is the text model's config as transformers reads it. `ropes` are the rotary embeddings of the blocks, None
    where mlx-lm's own are left in place. `stretched` are the `rope_parameters` that a config asked for instead of the
    base's own.
    """

    model_type: str
    module: str
    config: dict[str, Any]
    text: Any
    ropes: tuple[Rope, ...] | None
    proven: ProvenType
    stretched: Mapping[str, Any] | None = None

    @property
    def longest(self) -> tuple[int, str]:
        """Tokens of a row up to which mlx-lm computes what transformers does, 0 for any; and why."""
        window = 0 if self.proven.windows else window_of(self.text)
        turning = max((rope.longest for rope in self.ropes or ()), default=0)
        if window and (not turning or window < turning):
            return window, "mlx-lm does not build its sliding window"
        return turning, "its rope changes beyond that"

    @property
    def layer_settings(self) -> dict[str, Any]:
        """The keys of the text model's config that say how layers differ."""
        return layer_settings(self.text.to_dict())

    @property
    def pad_id(self) -> int | None:
        """The id that the config pads with, None where the embedding has no row for it."""
        pad: int | None = self.text.pad_token_id
        return None if padding_without_row(pad, getattr(self.text, "vocab_size", None)) else pad

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(text_config(self.config).get("tie_word_embeddings"))

    def build(self) -> Any:
        """The model in evaluation mode, with random weights that are not computed until asked for."""
        code = importlib.import_module(f"mlx_lm.models.{self.module}")
        model = code.Model(code.ModelArgs.from_dict(self.config))
        # Some types take the head off when they are shown weights without one.
        for owner in self._tied_owners(model):
            owner.pop("lm_head")
            owner.tie_word_embeddings = True
        text = text_config(self.config)
        model.eval()
        for patch in family_of(self.model_type).patches:
            patch(model, text)
        if self.ropes is not None:
            # LongCat's blocks hold two of transformers' layers each.
            shared = len(self.ropes) // len(model.layers)
            for layer, rope in zip(model.layers, self.ropes[::shared], strict=True):
                _turn_exactly(layer, rope)
        return model

    def _tied_owners(self, model: Any) -> list[Any]:
        return [owner for owner in _owners(model) if self.is_tied and "lm_head" in owner]

    def named(self, model: Any, weights: Weights) -> Weights:
        """The weights of the files by mlx-lm's names, in its layout."""
        family, text = family_of(self.model_type), text_config(self.config)
        kept = {
            name.replace(old, new): array
            for name, array in weights.items()
            for old, new in family.kept.items()
            if name.endswith(old)
        }
        for change in family.weights:
            weights = change(weights, text)
        if hasattr(model, "sanitize"):
            owners = [owner for owner in _owners(model) if self.is_tied and "lm_head" not in owner]
            for owner in owners:
                owner["lm_head"] = nn.Identity()
            weights = model.sanitize(weights)
            for owner in owners:
                dict.pop(owner, "lm_head", None)
        return {**weights, **{name: array.reshape(-1) for name, array in kept.items()}}


def _owners(model: Any) -> list[Any]:
    """The modules that can hold an output head."""
    inner = model.get("language_model")
    return [model, inner] if isinstance(inner, nn.Module) else [model]


def read_base(folder: BaseFolder, scaling: RopeScaling | None = None) -> Reading:
    """Translate a base's config, its positions stretched where that is asked for.

    Raises ModelError naming the first field that mlx-lm would read otherwise.
    """
    where = str(folder.path / "config.json")
    if folder.is_encoder:
        raise _not_opened("base=an encoder", folder, where)
    if folder.model_type not in transformers.CONFIG_MAPPING:
        raise unknown_type(folder, transformers.__version__)
    proven = proven_type(folder.model_type)
    if proven is None:
        raise _not_opened("base=a model type without proof", folder, where)
    return translated(folder, proven, scaling)


def translated(folder: BaseFolder, proven: ProvenType, scaling: RopeScaling | None = None) -> Reading:
    """`read_base`, with what is proven of the type."""
    where = str(folder.path / "config.json")
    config = _parse(folder)
    text = config.get_text_config()
    if scaling is not None:
        text.rope_parameters = scaling.of(text.rope_parameters, text.max_position_embeddings, where)
    check_fields(config, text, proven, where)
    with foreign_errors(partial(unreadable_config, folder)):
        spelled = translate(_known(config, text), family_of(folder.model_type))
        module = family_of(folder.model_type).module or mlx_lm.utils.MODEL_REMAPPING.get(
            folder.model_type, folder.model_type
        )
        ropes = _ropes(text, proven, where)
    return Reading(
        folder.model_type,
        module,
        spelled,
        text,
        ropes,
        proven,
        stretched=None if scaling is None else text.rope_parameters,
    )


def _known(config: Any, text: Any) -> dict[str, Any]:
    """The config without keys that transformers does not know, which mlx-lm might read all the same."""

    def fields(part: Any) -> dict[str, Any]:
        plain = type(part)().to_dict()
        return {name: value for name, value in part.to_dict().items() if name in plain or name in STRUCTURE}

    return fields(config) if config is text else {**fields(config), "text_config": fields(text)}


def _not_opened(row: str, folder: BaseFolder, where: str) -> ConfigError:
    problem = feature_refusal(row, "mlx", where)
    assert problem is not None
    reason = left_out().get(folder.model_type, "")
    message = f"{problem.message}; this is `{folder.model_type}`{': ' * bool(reason)}{reason}"
    return ConfigError.of([evolve(problem, message=message)])


def _parse(folder: BaseFolder) -> Any:
    plain = {
        key: _plain_floats(value)
        for key, value in folder.config.items()
        if key not in ("quantization", "quantization_config", "auto_map")
    }
    with foreign_errors(partial(unreadable_config, folder)):
        return transformers.CONFIG_MAPPING[folder.model_type].from_dict(plain)


def _plain_floats(value: Any) -> Any:
    """Infinity and its kin, which transformers writes as objects."""
    if isinstance(value, list):
        return [_plain_floats(each) for each in value]
    return float(value["__float__"]) if isinstance(value, dict) and set(value) == {"__float__"} else value


def unreadable_config(folder: BaseFolder, reason: str) -> ModelError:
    """The error for a config that a library could not make a model of, with its words."""
    return ModelError(
        "unreadable-base",
        f"transformers and mlx-lm cannot read the config: {reason}",
        where=str(folder.path / "config.json"),
        help="download the base again.",
    )


def check_fields(config: Any, text: Any, proven: ProvenType, where: str) -> None:
    """Raise ModelError for the first field whose value was not proven to be read alike."""
    for part in (config,) if config is text else (config, text):
        for name, value, usual in told_fields(part):
            if name in proven.reads or any(
                _is_told(value, each) for each in proven.values.get(name, [usual])
            ):
                continue
            if name in KINDS_OF_LAYERS and (value is None or _is_regular(value)):
                continue
            raise refused(where, f"{name}: {value}")


def _is_told(value: Any, told: Any) -> bool:
    """Whether a value is one that was equal: the same, one that is no smaller, or as many of the same kind."""
    if isinstance(told, dict) and set(told) == {"least"}:
        return type(value) is int and value >= told["least"]
    alike = isinstance(told, list) and isinstance(value, list) and len(set(map(str, told))) == 1
    return value == told or (alike and bool(value) and set(map(str, value)) == set(map(str, told)))


def told_fields(part: Any) -> Iterator[tuple[str, Any, Any]]:
    """The fields of a config that say something about the model: dotted name, value and the class's own value."""
    plain = type(part)().to_dict()
    for name, value in part.to_dict().items():
        if name in WEIGHTLESS or name in STRUCTURE or name not in plain:
            continue
        if isinstance(value, dict) and isinstance(plain[name], dict):
            for inner, each in value.items():
                if inner not in WEIGHTLESS:
                    yield f"{name}.{inner}", each, plain[name].get(inner)
        else:
            yield name, value, plain[name]


def _is_regular(kinds: Sequence[Any]) -> bool:
    """Whether every n-th layer is of one kind and all others of another, or the first few differ from the rest."""
    if len(set(kinds)) < 2:
        return True
    first = next(index for index, kind in enumerate(kinds) if kind != kinds[0])
    if len(set(kinds[first:])) == 1:
        return True
    every = first + 1
    wanted = [kinds[first] if index % every == first else kinds[0] for index in range(len(kinds))]
    return list(kinds) == wanted


def window_of(text: Any) -> int:
    """The sliding window of some layer, 0 where there is none."""
    kinds = getattr(text, "layer_types", None)
    if getattr(text, "use_sliding_window", None) is False or (kinds and "sliding_attention" not in kinds):
        return 0
    return getattr(text, "sliding_window", None) or 0


def layer_ropes(text: Any) -> Iterator[Mapping[str, Any] | None]:
    """The `rope_parameters` of each block."""
    parameters: Mapping[str, Any] = getattr(text, "rope_parameters", None) or {}
    by_kind = all(isinstance(each, dict) for each in parameters.values())
    for index in range(text.num_hidden_layers):
        yield (parameters.get(text.layer_types[index]) if by_kind and parameters else parameters) or None


def _ropes(text: Any, proven: ProvenType, where: str) -> tuple[Rope, ...] | None:
    """The blocks' ropes; None where the type has none, or of a kind that only mlx-lm knows."""
    each = list(layer_ropes(text))
    kinds = {parameters.get("rope_type", "default") for parameters in each if parameters}
    for kind in sorted(kinds - set(proven.ropes)):
        raise refused(where, f"rope_parameters.rope_type: {kind}")
    if not kinds or None in each or not kinds <= set(KINDS):
        return None
    latent = getattr(text, "kv_lora_rank", None)
    for parameters in each if not latent and "partial" not in proven.ropes else ():
        if (share := (parameters or {}).get("partial_rotary_factor")) not in (None, 1.0):
            raise refused(where, f"rope_parameters.partial_rotary_factor: {share}")
    head = getattr(text, "qk_rope_head_dim", None) if latent else getattr(text, "head_dim", None)
    head = head or text.hidden_size // text.num_attention_heads
    whole = [_whole(parameters or {}, text) for parameters in each]
    if latent:
        # Its turned dimensions are told apart; the share of a whole head says the same.
        whole = [{**parameters, "partial_rotary_factor": None} for parameters in whole]
    return tuple(read_rope(parameters, head, where) for parameters in whole)


def _whole(parameters: Mapping[str, Any], text: Any) -> Mapping[str, Any]:
    """With the factor that longrope takes from the lengths where it is not told."""
    if parameters.get("rope_type") != "longrope" or parameters.get("factor"):
        return parameters
    return {
        **parameters,
        "factor": text.max_position_embeddings / parameters["original_max_position_embeddings"],
    }


def _turn_exactly(layer: Any, rope: Rope) -> None:
    """Put the rope in the place of mlx-lm's in every module of a block that turns positions."""
    for _, module in layer.named_modules():
        own = module.get("rope") if isinstance(module, dict) else None
        if isinstance(own, nn.Module) and type(own).__name__ != "NoPE":
            module.rope = ExactRope(rope, turns_neighbours(own, 2 * rope.frequencies.size))
