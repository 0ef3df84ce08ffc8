"""Shrink a user's config.json to a model that a CPU builds and runs at once, with one layer of each kind.

Sizes are chosen by the names of settings (`SIZES`). Layers are chosen by kind: `layer_kinds` compares the layers of the
full-size model on the meta device, so no rule has to know which settings make a layer what it is.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from distlora.config import UserError, nearest
from distlora.config.errors import short
from distlora.model.hf_model import auto_class_of, decoder_path, layers_path

LayerKind = frozenset[tuple[str, str, object]]
"""The modules, the weights and the settings of a decoder layer, without its sizes and its place."""

MOST_LAYERS = 8
"""Layers of a small model whose kinds follow from a period."""

_SIZES = (
    # Vocabulary.
    (160, r"(unpadded_)?vocab_size(_per_layer_input)?"),
    (200, r"ngram_vocab_size_base"),
    # Widths of hidden states and of MLPs.
    (64, r"(out_|projection_)?hidden_size n_embd d_model embedding_dim word_embed_proj_dim lru_width ple_embed_dim"),
    (64, r"adapter_input_size adapter_(in|out)_dim"),
    (128, r"attention_hidden_size"),
    (8, r"hidden_size_per_layer_input"),
    (96, r"(dense_|projection_)?intermediate_size(_mlp)? ffn_(dim|hidden_size) dim_ff dff"),
    (16, r"dim_model_base"),
    # Ranks of factored weights.
    (24, r"q_lora_rank"),
    (16, r"(kv|o)_lora_rank"),
    (8, r"laurel_rank hc_lowrank adapter_rank gated_norm_rank loop_gate_rank mamba_dt_rank time_step_rank"),
    # Attention: heads and their sizes.
    (4, r"((swa_)?num_)?(attention_)?heads(_per_layer)? n_heads? num_query_groups linear_num_(value_)?heads"),
    (4, r"encoder_attention_heads"),
    (2, r"(swa_)?num_(global_)?(key_value|kv)_heads kv_n_heads linear_num_key_heads indexer_kv_heads o_groups"),
    (16, r"((swa|global|index|indexer|linear|linear_key|linear_value|attention)_)?head_dim dim_head kv_channels"),
    (16, r"qk_nope_head_dim v_head_dim index(er)?_n_heads rel_extent"),
    (24, r"qk_head_dim"),
    (8, r"qk_rope_head_dim rotary_dim d_rel"),
    # Attention: lengths, windows and sparse choices of keys.
    (512, r"max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length block_size"),
    (64, r"original_max_position_embeddings prompt_length max_inference_chunksize"),
    (8, r"sliding_window(_size)? (attention_|keep_)?window_size local_attention attention_chunk_size"),
    (8, r"floor_scale log_scaling_n_floor heavily_\w+ indexer_budget"),
    (4, r"indexer_compress_ratio index_block_size"),
    (6, r"index_topk"),
    (2, r"index_topk_blocks index_kpool"),
    # Experts.
    (4, r"num_(local_)?experts n_routed_experts moe_num_experts zero_expert_num"),
    (2, r"num_experts_per_tok(en)? moe_(topk|k|top_k) top_k_experts n_group num_expert_group"),
    (1, r"(n|num|moe_num)_shared_experts topk_group"),
    (32, r"(moe|shared|shared_experts?|moe_shared_expert)_intermediate_size expert_ffn_hidden_size moe_latent_size"),
    (16, r"router_hidden_size"),
    # Mixers with a state.
    (16, r"mamba_(d_head|head_?dim)"),
    (8, r"mamba_d_state (ssm_)?state_size (mamba_)?chunk_size (mamba_n|mamba_num|n_mamba)_heads"),
    (128, r"mamba_d_ssm"),
    (2, r"(mamba_)?n_?groups"),
    # Embeddings of n-grams, and images.
    (8, r"make_ngram_\w+"),
    (2, r"split_ngram_parts heads_per_ngram"),
    (1, r"spatial_merge_size"),
    # Dropout, and special tokens: each a token of its own.
    (0, r"(\w+_)?(dropout|pdrop|layerdrop|jitter_noise)(_prob|_p)? pad_token_id"),
    (1, r"eos_token_id"),
    (2, r"bos_token_id"),
    (3, r"\w+_(token_id|token_index)"),
)
"""Small values, and the settings that have them: regular expressions of whole names, separated by spaces."""
SIZES = [(re.compile(names.replace(" ", "|")), size) for size, names in _SIZES]
"""The same, compiled; the first pattern that matches a whole name counts."""
EQUAL = (
    *(("qk_nope_head_dim", "qk_rope_head_dim"), ("num_key_value_heads", "num_attention_heads")),
    *(("head_dim", "qk_rope_head_dim"), ("index_n_heads", "num_key_value_heads")),
    ("attention_hidden_size", "hidden_size"),
)
"""Settings that a small model has equal where the full-size one has."""

COUNTS = r"num_hidden_layers|n_layers?|num_layers(_per_stack)?|num_blocks|depth"
"""Settings that count layers."""
FIRST = (
    r"first_k_dense_replace|num_dense_layers|max_window_layers|moe_layer_start_index|loop_layer_index_\w+|"
    r"n_layers_per_\w+"
)
"""Settings that say how many of the first layers differ."""
LAST = r"num_kv_shared_layers"
"""Settings that say how many of the last layers differ."""
INDEXES = r"(?!no_rope_layers)\w*(layer|idx|indices|indexes|_ids)\w*"
"""Lists of the numbers of layers."""
FORGOTTEN = {
    *("architectures", "transformers_version", "dtype", "torch_dtype", "quantization_config", "auto_map"),
    *("id2label", "label2id", "_name_or_path"),
}
"""Settings that say how a checkpoint was saved."""
UNCHANGED = ("mlp_multipliers", "ssm_multipliers", "time_step_limit", "L_bp_cycles")
_PLACE = re.compile(r"training|_.*|\w*(idx|index|layer_id|layer_num\w*|drop|jitter|eps)\w*|p|name")
"""Attributes of modules that are no part of a layer's kind: its place in the model and what training alone uses."""


def read_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a config.json, with transformers' defaults and its lists by layer."""
    kept = {name: value for name, value in config.items() if name not in FORGOTTEN}
    name = kept.pop("model_type", None)
    if name not in CONFIG_MAPPING:
        raise UserError(
            f"model_type={short(name)} is not a model of the installed transformers"
            f"{nearest(str(name), CONFIG_MAPPING)}; set model_type in config.json to one of them, or install the "
            "release of transformers that has it"
        )
    with _refused(name):
        return CONFIG_MAPPING[name].from_dict(copy.deepcopy(kept)).to_dict() | {"model_type": name}


def build_on_meta(settings: Mapping[str, Any]) -> PreTrainedModel:
    """Build the language model of a config on the meta device: it has shapes and no numbers."""
    with torch.device("meta"):
        return build(settings)


def build(settings: Mapping[str, Any]) -> PreTrainedModel:
    """Build the language model of a config with random weights, by the class that transformers has for text."""
    name = settings["model_type"]
    with _refused(name):
        hf_config = CONFIG_MAPPING[name].from_dict(copy.deepcopy(dict(settings)))
        auto: Any = getattr(transformers, auto_class_of(hf_config, name))
        return auto.from_config(hf_config, trust_remote_code=False)


@contextlib.contextmanager
def _refused(name: str) -> Iterator[None]:
    """Raise UserError with the reason where transformers does not take the settings of a model type."""
    try:
        yield
    except Exception as error:  # Anything: each model type has code of its own for its settings.
        reason = " ".join(f"{error.__class__.__name__}: {error}".split())
        raise UserError(f"transformers cannot build the {name} of this config.json: {reason}") from error


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of the text decoder."""
    decoder: Any = model.get_submodule(decoder_path(model))
    return decoder.get_submodule(layers_path(decoder))


def layer_kinds(model: PreTrainedModel) -> list[LayerKind]:
    """Return the kind of each decoder layer. Equal kinds compute the same, up to sizes, scales and weights."""
    return [_kind(layer) for layer in decoder_layers(model)]


def _kind(layer: nn.Module) -> LayerKind:
    features: set[tuple[str, str, object]] = set()
    for path, module in layer.named_modules(remove_duplicate=False):
        place = re.sub(r"\b\d+\b", "*", path)
        features.add((place, "class", module.__class__.__qualname__))
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        features |= {(place, name, tensor.dim()) for name, tensor in tensors}
        for name, value in vars(module).items():
            if isinstance(value, (bool, str, int, float, NoneType)) and not _PLACE.fullmatch(name):
                # A size or a scale: a small model has another, but has it too.
                features.add((place, name, value if isinstance(value, (bool, str, NoneType)) else value > 0))
    return frozenset(features)


def shrink(config: Mapping[str, Any], full: PreTrainedModel | None = None) -> dict[str, Any]:
    """Return a config.json of a small model with the same kinds of layers, two layers at least.

    `full`: the model of `config` on the meta device, if the caller has built it.

    Scales, caps, epsilons, rope types and activations stay. Raises UserError if a kind cannot be kept.
    """
    settings = read_settings(config)
    kinds = layer_kinds(build_on_meta(settings) if full is None else full)
    count = len(kinds)
    if not kinds:
        raise UserError(
            f"this config.json describes a {settings['model_type']} without decoder layers; download it again"
        )
    first = [kinds.index(kind) for kind in kinds]
    twice = [i for i in range(count) if first[:i].count(first[i]) < 2]
    once = sorted(set(first)) if len(set(first)) > 1 else twice
    prefixes = [range(end) for end in range(max(2, len(once)), min(count, MOST_LAYERS) + 1)]
    reason, missing = "", set(kinds)
    for kept in sorted((once, twice, *prefixes), key=len):
        small = _Smaller(kept, count).settings(settings)
        try:
            small_kinds = set(layer_kinds(build_on_meta(small)))
        except UserError as error:
            reason = reason or str(error)
            continue
        if small_kinds == set(kinds):
            return small
        missing = min(missing, set(kinds) - small_kinds, key=len)
    layers = ", ".join(map(str, sorted(kinds.index(kind) for kind in missing)))
    raise UserError(
        f"the first {MOST_LAYERS} layers of a small {settings['model_type']} have no layer like layer {layers} of this "
        f"config.json{reason and '; ' + reason}; it cannot be checked before training"
    )


@dataclass(frozen=True)
class _Smaller:
    """Settings of a small model that keeps some of the layers of a full-size one."""

    kept: Sequence[int]
    count: int
    """Layers of the full-size model."""

    def settings(self, full: Mapping[str, Any]) -> dict[str, Any]:
        """Return small settings with the same names."""
        small = {name: self.value(name, value, full) for name, value in full.items() if name not in FORGOTTEN}
        small |= {name: small[other] for name, other in EQUAL if full.get(name) and full[name] == full.get(other)}
        rope, nope = small.get("qk_rope_head_dim"), small.get("qk_nope_head_dim")
        if rope and nope and full.get("head_dim", rope) != full["qk_rope_head_dim"]:
            small["head_dim"] = nope + rope
        if small.get("qk_head_dim") and rope is not None and nope is not None:
            small["qk_head_dim"] = nope + rope
        if "expand" in full and "num_heads" in full:
            small["num_heads"] = full["expand"] * small["hidden_size"] // small["head_dim"]
        if "attention_hidden_size" in full and "attention_head_dim" in full:
            small["attention_head_dim"] = 2 * small["hidden_size"] // small["num_attention_heads"]
        if "attention_types" in full:
            small["attention_types"] = [[small["attention_layers"], 1]]
        return small

    def value(self, name: str, value: Any, full: Mapping[str, Any]) -> Any:
        """Return the small value of one of the settings `full`."""
        if name in ("bos_token_id", "eos_token_id"):  # Tokenizers alone read them: models share a small one.
            return 1
        if name in UNCHANGED or value is None or isinstance(value, (bool, str)):
            return copy.deepcopy(value)
        if name == "per_layer_config":
            layers = {int(layer): changes for layer, changes in value.items()}
            small = {str(j): self.settings(layers[i]) for j, i in enumerate(self.kept) if i in layers}
            for j, i in enumerate(self.kept):  # Larger heads stay larger.
                if full.get("head_dim") and layers.get(i, {}).get("head_dim"):
                    small[str(j)]["head_dim"] *= max(1, layers[i]["head_dim"] // full["head_dim"])
            return small or None
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                return dict(value)  # Aria's numbers of patches, not settings.
            return self.section(name, value, full)
        if isinstance(value, (list, tuple)):
            return self.entries(name, list(value), full)
        if re.fullmatch(FIRST, name):
            return sum(i < value for i in self.kept)
        if re.fullmatch(LAST, name):
            return sum(i >= self.count - value for i in self.kept)
        if re.fullmatch(COUNTS, name) and value % self.count == 0:
            return value // self.count * len(self.kept)
        return _size(name, value)

    def section(self, name: str, value: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
        """Return small settings of a part: another model, such as a vision tower, has its own layers."""
        if name.endswith("_config") and name != "text_config":
            layers = next((value[key] for key in ("num_hidden_layers", "num_layers", "depth") if value.get(key)), 0)
            return _Tower(_tower_layers(value, layers), layers).settings(value) if layers else self.settings(value)
        small = self.settings(value)
        head = full.get("head_dim") or full.get("hidden_size", 1) // full.get("num_attention_heads", 1) or 1
        for key in {"short_factor", "long_factor", "mrope_section"} & set(value):  # They share the pairs of a head.
            kept = len(value[key]) * 16 // head
            small[key] = [size * 16 // head for size in value[key]] if key == "mrope_section" else value[key][:kept]
        if "mrope_section" in value:
            small["mrope_section"][0] += sum(value["mrope_section"]) * 16 // head - sum(small["mrope_section"])
        return small

    def entries(self, name: str, value: list[Any], full: Mapping[str, Any]) -> list[Any]:
        """Return the entries of a list that belong to the kept layers."""
        numbers = all(type(entry) is int for entry in value) and not name.endswith("token_id")
        if numbers and re.fullmatch(INDEXES, name) and len(set(value)) == len(value):
            return [j for j, i in enumerate(self.kept) if i in value]
        if numbers and name.endswith("source_layers") and len(value) == self.count:
            return [max(j for j, i in enumerate(self.kept) if i <= value[layer]) for layer in self.kept]
        if len(value) == self.count and not name.endswith("token_id"):
            value = [value[i] for i in self.kept]
        return [_size(name, entry) if type(entry) is int else copy.deepcopy(entry) for entry in value]


class _Tower(_Smaller):
    """Settings of a small vision tower, whose windows are counted in pixels and stay as they are."""

    def value(self, name: str, value: Any, full: Mapping[str, Any]) -> Any:
        """Return the small value of one of the tower's settings `full`."""
        return value if name == "window_size" else super().value(name, value, full)


def _tower_layers(settings: Mapping[str, Any], count: int) -> Sequence[int]:
    """Return two layers of a tower that the small one keeps, with two of each list of layers in its settings."""
    kept: set[int] = set()
    for name, value in settings.items():
        if isinstance(value, (list, tuple)) and re.fullmatch(INDEXES, name):
            kept |= set([layer for layer in value if type(layer) is int and 0 <= layer < count][:2])
    others = [layer for layer in range(count) if layer not in kept]
    return sorted({*kept, *others[: max(1, 2 - len(kept))]})


def is_size(name: str) -> bool:
    """Return whether a setting of this name is made small."""
    return any(names.fullmatch(name) for names, _ in SIZES)


def _size(name: str, value: float) -> float:
    """Return the small value of a size; 0, 1 and 2 stay, so that one head of keys or the best expert alone stay."""
    for names, size in SIZES:
        if names.fullmatch(name):
            return type(value)(size) if value > 2 or size == 0 else value
    return value
