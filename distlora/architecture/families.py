"""Describe the supported model families: their classes, decoder, LM head, and the settings that are refused.

Torch-free: the launcher asks before any process starts, the worker asks the same again before it builds. Everything
here was read in the modeling files of transformers 5.24 and is tried in tests/test_families.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import UserError, nearest
from distlora.config.json_files import Shape, check_shape, read_object

STATIC_ROPES = ("default", "linear", "dynamic", "yarn", "llama3")
"""Rotary embeddings whose frequencies do not depend on what else is in the batch. `dynamic` changes its base only
beyond max_position_embeddings, where no row may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayout:
    """Names of a family's mixture of experts in its decoder layers; every layer has one."""

    module: str = "mlp.experts"
    """Path of the experts in a layer."""
    router: str = "mlp.gate"
    """Path of the router in a layer."""
    weights: tuple[str, ...] = ("gate_up_proj", "down_proj")
    """The 3-D weights of the module, in the order of its parameters, which is the order in which PEFT wraps them."""
    on_disk: tuple[str, ...] = ("mlp",)
    """Names on disk of the modules of a layer that hold routers and experts."""
    intermediate: str = "intermediate_size"
    """Key of config.json that holds an expert's inner size."""

    def num_experts(self, settings: Mapping[str, Any]) -> int:
        """Return the number of experts of a layer, by either of its two names in config.json."""
        return int(settings["num_experts"] if "num_experts" in settings else settings["num_local_experts"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model_type of transformers, as far as building, naming and checking it differ from Llama."""

    model_type: str
    model_class: str
    """The transformers class that AutoModelForCausalLM makes of it, which PEFT loads an adapter onto."""
    attention: str = "sdpa"
    """Attention implementation; eager where the scores are capped, which SDPA cannot do."""
    decoder: str = "model"
    """Path of the decoder in that class."""
    text_config: str | None = None
    """Key of config.json that holds the decoder's settings; None: the top level."""
    disk_prefixes: tuple[str, ...] = ("model.", "")
    """Prefixes of `layers.0...` on disk: of a saved ForCausalLM and of a saved bare decoder."""
    disk_heads: tuple[str, ...] = ("lm_head.weight",)
    """The head's names on disk."""
    tied: bool = False
    """tie_word_embeddings where config.json does not say."""
    head_softcap: bool = False
    """True if the head applies config's final_logit_softcapping."""
    layer_types: bool = False
    """True if the decoder picks a mask per layer by config's layer_types."""
    blind_masks: bool = False
    """True if the decoder ignores positions in its masks, so that packed documents would leak: it then gets masks by
    layer type."""
    experts: ExpertLayout | None = None
    """None: a family without experts."""
    mlp_norms: tuple[str | None, str | None] = ("post_attention_layernorm", None)
    """The norms of a decoder layer before and after its MLP, whose path is `mlp` in every family."""
    head_norms: bool = False
    """True if each head of the queries and keys goes through a norm."""
    ropes: tuple[str, ...] = (*STATIC_ROPES, "longrope")

    @property
    def composite(self) -> bool:
        """True if the folder holds more than the text model (a vision tower), which stays unchanged."""
        return self.text_config is not None


_GEMMA_MLP_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama", model_class="LlamaForCausalLM"),
        Family(model_type="mistral", model_class="MistralForCausalLM"),
        Family(model_type="qwen2", model_class="Qwen2ForCausalLM", layer_types=True),
        Family(model_type="qwen3", model_class="Qwen3ForCausalLM", layer_types=True, head_norms=True),
        Family(
            model_type="gemma2",
            model_class="Gemma2ForCausalLM",
            attention="eager",
            tied=True,
            head_softcap=True,
            layer_types=True,
            mlp_norms=_GEMMA_MLP_NORMS,
        ),
        Family(
            model_type="gemma3_text",
            model_class="Gemma3ForCausalLM",
            head_norms=True,
            tied=True,
            head_softcap=True,
            layer_types=True,
            mlp_norms=_GEMMA_MLP_NORMS,
        ),
        # Its forward caps no logits, whatever text_config.final_logit_softcapping says.
        Family(
            model_type="gemma3",
            model_class="Gemma3ForConditionalGeneration",
            decoder="model.language_model",
            text_config="text_config",
            head_norms=True,
            disk_prefixes=("language_model.model.", "model.language_model.", "language_model."),
            disk_heads=("language_model.lm_head.weight", "lm_head.weight"),
            tied=True,
            layer_types=True,
            mlp_norms=_GEMMA_MLP_NORMS,
        ),
        Family(model_type="phi3", model_class="Phi3ForCausalLM", ropes=("default", "longrope")),
        Family(
            model_type="mixtral",
            model_class="MixtralForCausalLM",
            experts=ExpertLayout(on_disk=("block_sparse_moe", "mlp")),
        ),
        Family(
            model_type="qwen3_moe",
            model_class="Qwen3MoeForCausalLM",
            head_norms=True,
            experts=ExpertLayout(intermediate="moe_intermediate_size"),
        ),
        # Its attention has sinks, which SDPA cannot add to a softmax.
        Family(
            model_type="gpt_oss",
            model_class="GptOssForCausalLM",
            attention="eager",
            layer_types=True,
            blind_masks=True,
            experts=ExpertLayout(router="mlp.router"),
        ),
    )
}

FUSED_LINEARS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Linears that hold several projections in one weight (phi3), which presets name apart."""

_AGAIN = "download it again"
_SIZES = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "num_experts", "num_local_experts", "num_experts_per_tok"),
    "sliding_window",
)
_LARGEST_SIZE = 2**31
_MODEL: Shape = {
    "tie_word_embeddings?": (bool, type(None)),
    "text_config?": (dict, type(None)),
    "quantization_config?": (dict, type(None)),
}
_SETTINGS: Shape = {
    **{f"{name}?": (int, type(None)) for name in _SIZES},
    "layer_types?": ([str], type(None)),
    "rope_scaling?": (dict, type(None)),
    "rope_parameters?": (dict, type(None)),
    "mlp_only_layers?": ([int], type(None)),
}
"""Keys of config.json that are checked in this module; transformers checks the rest when it builds the model."""


def check_tiles(mlp_tile: int | None, family: Family) -> None:
    """Refuse tiles of an MLP that is one of experts."""
    if mlp_tile is not None and family.experts is not None:
        raise UserError(
            f"train.mlp_tile={mlp_tile} runs an MLP on part of a sequence, and {family.model_type} sorts and balances "
            "all tokens of a sequence over experts; leave it out (train.checkpointing=selective "
            "recomputes experts whole)"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model's folder. Raises UserError without one, or if it is not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no config.json; point {{model.path}} at a model's folder in Hugging Face format"
        )
    return read_object(path, _AGAIN)


def family_of(model: Mapping[str, Any], place: Path | str) -> Family:
    """Return the family of a config.json. Raises UserError with the nearest name if it is not supported."""
    model_type = model.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is not None:
        return family
    raise UserError(
        f"{place}: model_type={model_type!r} is not supported; the supported families are "
        f"{', '.join(FAMILIES)}{nearest(str(model_type), FAMILIES)}"
    )


def text_settings(model: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """Return the decoder's part of config.json."""
    return model if family.text_config is None else model.get(family.text_config) or {}


def is_tied(model: Mapping[str, Any], family: Family) -> bool:
    """Return True if the LM head's weight is the embedding's, by the config of the whole model."""
    return bool(model.get("tie_word_embeddings", family.tied))


def check_config(
    model: Mapping[str, Any], place: Path | str, *, sequence_length: int | None = None, full: bool = False
) -> Family:
    """Return the family of a config.json. Raises UserError with the reason if the model cannot be trained.

    `place` is the config.json for messages, sequence_length the tokens of a row, `full` full fine-tuning.
    """
    family = family_of(model, place)
    check_shape(model, _MODEL, place, _AGAIN)
    settings = text_settings(model, family)
    if family.text_config is not None and not settings:
        where = f"where {family.model_type} keeps its text model"
        raise UserError(f"{place} has no {family.text_config}, {where}; {_AGAIN}")
    check_shape(settings, _SETTINGS, place, _AGAIN)
    for name in _SIZES:
        if (size := settings.get(name)) is not None and not 0 < size < _LARGEST_SIZE:
            raise UserError(f"{place} is damaged: {name}={size} is not a valid size; {_AGAIN}")
    if full and family.composite:
        raise UserError(
            f"adapter=full would save {family.model_type} without its vision tower; set adapter=lora, "
            "or convert the folder to its text model (gemma3_text) first"
        )
    if family.experts is not None:
        _check_experts(model, settings, place, family, full=full)
    _check_class(model, place, family)
    if settings.get("use_bidirectional_attention"):
        raise UserError(
            f"{place}: use_bidirectional_attention lets tokens see those after them; set {{model.path}} to a "
            "causal model"
        )
    known = ("full_attention", "sliding_attention")
    unknown = [name for name in settings.get("layer_types") or () if name not in known]
    if family.layer_types and unknown:
        raise UserError(
            f"{place}: layer_types has {unknown[0]!r}, which is not supported for {family.model_type}; supported are"
            f" {' and '.join(known)}; {_AGAIN}"
        )
    # In either format: rope_scaling, or rope_parameters, whole or by layer type.
    ropes = [rope for rope in (settings.get("rope_scaling"), settings.get("rope_parameters")) if rope]
    for rope in (*ropes, *(value for both in ropes for value in both.values())):
        if isinstance(rope, Mapping) and ("rope_type" in rope or "type" in rope):
            _check_rope(rope, settings, place, family, sequence_length)
    limit = settings.get("max_position_embeddings")
    if isinstance(limit, int) and sequence_length is not None and sequence_length > limit:
        raise UserError(
            field="data.sequence_length",
            value=f"{sequence_length:,}",
            reason=f"is beyond the model's {limit:,} positions (max_position_embeddings in {place})",
            cure=f"set {{field}}={limit} or less",
        )
    return family


def _check_class(model: Mapping[str, Any], place: Path | str, family: Family) -> None:
    """Refuse code that comes with the weights, unless transformers has the very class (Phi-3 on the hub names both)."""
    remote = model.get("auto_map")
    name = remote.get("AutoModelForCausalLM") if isinstance(remote, Mapping) else None
    if isinstance(name, str) and name.rpartition(".")[2] != family.model_class:
        raise UserError(
            f"{place}: auto_map requires code that comes with the weights ({name}), which distlora does not run, and "
            f"{family.model_class} of transformers may compute something else; use a base without auto_map, or delete "
            "the entry if the two are the same"
        )


def is_mxfp4(model: Mapping[str, Any]) -> bool:
    """Return True if a checkpoint has experts in MXFP4, by its config.json."""
    quantization = model.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == "mxfp4"


def _check_experts(
    model: Mapping[str, Any], settings: Mapping[str, Any], place: Path | str, family: Family, *, full: bool
) -> None:
    if full:
        raise UserError(
            f"adapter=full on a mixture of experts ({family.model_type}) is covered by no test; set adapter=lora "
            "(adapter.target_modules=all-linear adapts the experts too)"
        )
    if is_mxfp4(model):
        raise UserError(
            f"{place}: quantization_config.quant_method='mxfp4': experts in MXFP4 are neither kept nor read; set "
            "{model.path} to a copy in bf16 (transformers writes one: from_pretrained(..., "
            "quantization_config=Mxfp4Config(dequantize=True), dtype='bfloat16'), then save_pretrained)"
        )
    assert family.experts is not None
    for keys in (("hidden_size",), (family.experts.intermediate,), ("num_local_experts", "num_experts")):
        if not any(isinstance(settings.get(key), int) and settings[key] > 0 for key in keys):
            raise UserError(f"{place} has no {' or '.join(keys)}; download it again")
    step, dense = settings.get("decoder_sparse_step", 1), settings.get("mlp_only_layers") or []
    if step != 1 or dense:
        which = f"decoder_sparse_step={step}" if step != 1 else f"mlp_only_layers={dense}"
        raise UserError(
            f"{place}: {which} makes some layers dense, whose gate_proj, up_proj and down_proj PEFT takes for names of "
            f"experts on {family.model_type}, so it could not load an adapter on them; only models with experts in "
            "every layer are supported"
        )


def _check_rope(
    rope: Mapping[str, Any],
    settings: Mapping[str, Any],
    place: Path | str,
    family: Family,
    sequence_length: int | None,
) -> None:
    kind = str(rope.get("rope_type", rope.get("type")))
    if family.model_type == "phi3" and kind in ("su", "yarn"):  # As Phi3Config reads them.
        kind = "longrope"
    if kind not in family.ropes:
        raise UserError(
            f"{place}: rope_type={kind!r} is not supported for {family.model_type}; supported are "
            f"{', '.join(family.ropes)}{nearest(kind, family.ropes)}"
        )
    if kind != "longrope":
        return
    original = settings.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    if original is None:
        original = 4096 if family.model_type == "phi3" else settings.get("max_position_embeddings")
    if isinstance(original, int) and sequence_length is not None and sequence_length > original:
        raise UserError(
            field="data.sequence_length",
            value=f"{sequence_length:,}",
            reason=f"is beyond {original:,} tokens (original_max_position_embeddings in {place}), where longrope picks "
            "its factors by the longest document of the batch and packed documents differ from single ones",
            cure=f"set {{field}}={original} or less",
        )


def names_on_disk(names: Iterable[str], family: Family) -> dict[str, str]:
    """Return the name on disk of each of the text model's tensors, by transformers' name.

    From the prefixes alone, which is enough to refuse a bad folder early; what is loaded is decided by transformers'
    own mapping (distlora/weights/conversion.py).
    """
    present = list(names)
    embeddings = {prefix: f"{prefix}embed_tokens.weight" for prefix in family.disk_prefixes}
    found = set(present)
    prefix = next((prefix for prefix, name in embeddings.items() if name in found), family.disk_prefixes[0])
    own = re.compile(re.escape(prefix) + r"(layers\..+|embed_tokens\..+|norm\..+)")
    result = {}
    for name in present:
        match = own.fullmatch(name)
        if match is not None:
            result[f"{family.decoder}.{match[1]}"] = name
    head = next((name for name in family.disk_heads if name in found), None)
    return result if head is None else result | {"lm_head.weight": head}
