"""Derive the shapes of a model's weights from its config.json, before it is downloaded or built. Imports no torch."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from distlora.architecture.families import Family, family_of, is_tied, text_settings
from distlora.architecture.targets import expert_shapes, select_adapted
from distlora.config import AdapterConfig, UserError, nearest
from distlora.config.errors import short

_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {"vocab_size": 256_000, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "gemma3_text": {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "gemma3": {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "qwen3": {"head_dim": 128},
    "gpt_oss": {"head_dim": 64, "attention_bias": True},
}
"""Defaults of transformers for keys that config.json files on the hub leave out."""


_MOST = {"vocab_size": 2**31, "hidden_size": 2**31, "num_hidden_layers": 1000, "num_attention_heads": 2**31}
"""Sizes that every config.json has to say, and what they are below: a plan goes through all layers."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of a decoder block, by its path in it."""

    path: str
    shape: tuple[int, ...]
    packs: bool = False
    """True if quant=nf4 keeps it in 4 bits: linears and the fused weights of experts."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapter of one linear, or of all experts of a fused weight (E x r rows of A, columns of B)."""

    path: str
    """Hugging Face path of what it adapts."""
    down: tuple[int, int]
    """Shape of A."""
    up: tuple[int, int]
    """Shape of B."""
    magnitude: int = 0
    """Numbers of DoRA's magnitude."""

    @property
    def place(self) -> str:
        """The path in its block."""
        return self.path.partition(".layers.")[2].partition(".")[2]

    @property
    def numels(self) -> tuple[int, ...]:
        """Number of elements of each parameter."""
        own = (math.prod(self.down), math.prod(self.up))
        return (*own, self.magnitude) if self.magnitude else own

    @property
    def numel(self) -> int:
        """Number of elements."""
        return sum(self.numels)


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """A decoder whose blocks are all alike, as those of every supported family are."""

    family: Family
    vocabulary: int
    """Rows of the embedding and of the head."""
    hidden: int
    num_layers: int
    tied: bool
    """True if the head's weight is the embedding's."""
    block: tuple[Weight, ...]

    @property
    def numel(self) -> int:
        """Parameters, a tied matrix once."""
        matrices = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return matrices + self.hidden + self.num_layers * sum(weight.numel for weight in self.block)

    @property
    def packed_numel(self) -> int:
        """Parameters that quant=nf4 keeps in 4 bits."""
        return self.num_layers * sum(weight.numel for weight in self.block if weight.packs)

    def ties(self, config: AdapterConfig) -> bool:
        """Return True if a run has one matrix for embedding and LM head; a trained whole one is untied."""
        return self.tied and not config.modules_to_save

    def adapters(self, config: AdapterConfig) -> tuple[tuple[Adapter, ...], ...]:
        """Return the adapters of each decoder layer.

        Raises UserError if the targets match nothing (`select_adapted`).
        """
        return _adapters(Asked(self, config))

    def alike(self, config: AdapterConfig) -> tuple[tuple[Adapter, int], ...]:
        """Return one of each kind of adapter, and the number of layers that have it. Raises as `adapters`."""
        return _alike(Asked(self, config))

    def adapted_numel(self, config: AdapterConfig) -> int:
        """Return the number of elements of all adapters. Raises as `adapters`."""
        return sum(count * each.numel for each, count in self.alike(config))


@dataclass(frozen=True, slots=True)
class Asked:
    """A cache key: the adapters of a model, and further inputs of a cached result.

    Settings with mappings have no hash.
    """

    shapes: ModelShapes
    config: AdapterConfig
    more: tuple[Any, ...] = ()

    def __hash__(self) -> int:
        return hash((self.shapes.num_layers, self.shapes.hidden, self.config.r, self.more))


@functools.lru_cache(maxsize=16)
def _adapters(request: Asked) -> tuple[tuple[Adapter, ...], ...]:
    """Return the adapters of each decoder layer.

    Cached: choosing settings of a 405B model would match 882 paths for each of hundreds of plans.
    """
    shapes, config = request.shapes, request.config
    fused = expert_paths(shapes.family)
    found = {
        f"{shapes.family.decoder}.layers.{layer}.{weight.path.removesuffix('.weight')}": (layer, weight)
        for layer in range(shapes.num_layers)
        for weight in shapes.block
        if weight.packs
    }
    linears = [path for path, (_, weight) in found.items() if weight.path not in fused]
    blocks: list[list[Adapter]] = [[] for _ in range(shapes.num_layers)]
    for path in select_adapted(config, linears, shapes.family, shapes.num_layers):
        layer, weight = found[path]
        *experts, out, inner = weight.shape
        rows = math.prod(experts) * config.rank_of(path)
        blocks[layer].append(Adapter(path, (rows, inner), (out, rows), out if config.use_dora else 0))
    return tuple(map(tuple, blocks))


@functools.lru_cache(maxsize=16)
def _alike(request: Asked) -> tuple[tuple[Adapter, int], ...]:
    kinds: dict[object, list[Adapter]] = {}
    for block in _adapters(request):
        for each in block:
            kinds.setdefault((each.place, each.down, each.up, each.magnitude), []).append(each)
    return tuple((adapters[0], len(adapters)) for adapters in kinds.values())


def expert_paths(family: Family) -> tuple[str, ...]:
    """Return the paths in a block of the fused weights of its experts."""
    layout = family.experts
    return () if layout is None else tuple(f"{layout.module}.{weight}" for weight in layout.weights)


def shapes_of(model: Mapping[str, Any], place: Path | str, *, vocabulary: int | None = None) -> ModelShapes:
    """Return the shapes of a model from its config.json (`read_config`).

    `place` is the file, for messages; `vocabulary` the rows of embedding and LM head if tokens are added.

    Raises UserError for a family that is not supported, and for a config.json that lacks a size.
    """
    family = family_of(model, place)
    sizes = sizes_of(model, family)
    for name, most in _MOST.items():
        size = sizes.get(name)
        if size is None:
            raise UserError(f"{place} has no {name}, so the model's size cannot be calculated; download it again")
        if type(size) is not int or not 0 < size < most:
            raise UserError(f"{place} is damaged: {name}={short(size)} is none that a model has; download it again")
    layers, kinds = sizes["num_hidden_layers"], sizes.get("layer_types")
    if kinds is not None and len(kinds) != layers:
        raise UserError(
            f"{place} is damaged: layer_types has {len(kinds)} layers, num_hidden_layers={layers}; download it again"
        )
    heads, keys = sizes["num_attention_heads"], sizes.get("num_key_value_heads", sizes["num_attention_heads"])
    if heads % keys or not head_size(sizes):
        raise UserError(
            f"{place} is damaged: {heads} query heads and {keys} key heads do not divide hidden_size="
            f"{sizes['hidden_size']}; download it again"
        )
    return ModelShapes(
        family=family,
        vocabulary=sizes["vocab_size"] if vocabulary is None else vocabulary,
        hidden=sizes["hidden_size"],
        num_layers=sizes["num_hidden_layers"],
        tied=is_tied(model, family),
        block=(*_attention(family, sizes), *_feed_forward(family, sizes, place), *_norms(family, sizes["hidden_size"])),
    )


def sizes_of(model: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the decoder's sizes in config.json, with the defaults of transformers for those it leaves out."""
    given = {name: value for name, value in text_settings(model, family).items() if value is not None}
    return _DEFAULTS.get(family.model_type, {}) | given


def head_size(sizes: Mapping[str, Any]) -> int:
    """Return the columns of one head of attention, by `sizes_of`."""
    size: int = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    return size


def attention_columns(sizes: Mapping[str, Any]) -> tuple[int, int]:
    """Return the columns of (queries, keys or values), by `sizes_of`."""
    heads, size = sizes["num_attention_heads"], head_size(sizes)
    return heads * size, sizes.get("num_key_value_heads", heads) * size


@dataclass(frozen=True, kw_only=True, slots=True)
class Biases:
    """Linears of a block that have a bias, experts' aside."""

    qkv: bool
    o: bool
    mlp: bool

    @classmethod
    def of(cls, family: Family, sizes: Mapping[str, Any]) -> Biases:
        """Read from `sizes_of`; some families have no biases whatever config.json states."""
        kind = family.model_type
        has_bias = bool(sizes.get("attention_bias")) and kind not in ("mistral", "mixtral", "phi3", "qwen2")
        return cls(qkv=has_bias or kind == "qwen2", o=has_bias, mlp=kind == "llama" and bool(sizes.get("mlp_bias")))


def _linear(path: str, out: int, inner: int, *, bias: bool) -> list[Weight]:
    weights = [Weight(f"{path}.weight", (out, inner), packs=True)]
    return [*weights, Weight(f"{path}.bias", (out,))] if bias else weights


def _attention(family: Family, sizes: Mapping[str, Any]) -> list[Weight]:
    kind, hidden = family.model_type, sizes["hidden_size"]
    (queries, keys), biases = attention_columns(sizes), Biases.of(family, sizes)
    parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    if kind == "phi3":
        parts = {"qkv_proj": queries + 2 * keys}
    found = [each for name, out in parts.items() for each in _linear(f"self_attn.{name}", out, hidden, bias=biases.qkv)]
    found += _linear("self_attn.o_proj", hidden, queries, bias=biases.o)
    if family.head_norms:
        found += [Weight(f"self_attn.{name}.weight", (head_size(sizes),)) for name in ("q_norm", "k_norm")]
    if kind == "gpt_oss":
        found.append(Weight("self_attn.sinks", (sizes["num_attention_heads"],)))
    return found


def _feed_forward(family: Family, sizes: Mapping[str, Any], place: Path | str) -> list[Weight]:
    kind, hidden, layout = family.model_type, sizes["hidden_size"], family.experts
    if layout is not None:
        count, has_biases = layout.num_experts(sizes), kind == "gpt_oss"
        found = [Weight(f"{layout.router}.weight", (count, hidden))]
        found += [Weight(f"{layout.router}.bias", (count,))] if has_biases else []
        for path, shape in zip(expert_paths(family), expert_shapes(family, 1, sizes).values(), strict=True):
            found.append(Weight(path, shape, packs=True))
            found += [Weight(f"{path}_bias", shape[:2])] if has_biases else []
        return found
    inner = sizes.get("intermediate_size")
    if not isinstance(inner, int):
        raise UserError(
            f"{place} has no intermediate_size, so the model's size cannot be calculated; download it again"
        )
    parts = {"gate_up_proj": 2 * inner} if kind == "phi3" else {"gate_proj": inner, "up_proj": inner}
    bias = Biases.of(family, sizes).mlp
    found = [each for name, out in parts.items() for each in _linear(f"mlp.{name}", out, hidden, bias=bias)]
    return [*found, *_linear("mlp.down_proj", hidden, inner, bias=bias)]


def _norms(family: Family, hidden: int) -> list[Weight]:
    names = ("input_layernorm", "post_attention_layernorm", *filter(None, family.mlp_norms))
    return [Weight(f"{name}.weight", (hidden,)) for name in dict.fromkeys(names)]


EXTRA = 2
"""Columns beside a head's, for what is subtracted within a product: its bf16, and the rest."""
_LONGEST, _FEWEST_ROWS = 128, 64
"""Queries of a tile at the most; G n at the least, where there are as many."""
_SCORES = 2**20
"""Largest number of scores that are computed at once: 2 MiB, the size of a cache."""


def tile_length(length: int, groups: int) -> int:
    """Return the number of queries of a tile: one product of `attend_on_cpu`, for `groups` query heads per key head.

    It depends on the document's length alone, so that no document's bits depend on those beside it.
    """
    fits = max(_SCORES // (groups * length), -(-_FEWEST_ROWS // groups))
    return min(_LONGEST, fits, length)


def scores_at_once(longest: int, groups: int, key_heads: int) -> int:
    """Return the number of scores that memory is reserved for: of as many key heads as fit, at least one.

    Beyond _LONGEST tokens a shorter document can have as many as fit, and the longest has a few less.
    """
    scores_per_head = groups * tile_length(longest, groups) * longest
    most = min(_SCORES, groups * min(_LONGEST, longest) * longest)
    return max(scores_per_head, most, min(_SCORES, scores_per_head * key_heads))


def tiles(length: int, tile: int, left: int | None) -> Iterator[tuple[int, int, int]]:
    """Yield (first query, end of queries and keys, first key) of each tile of a document.

    A token sees `left` tokens before it; None means all.
    """
    for start in range(0, length, tile):
        yield start, min(length, start + tile), 0 if left is None else max(0, start - left)


def computed_pairs(length: int, groups: int, window: int | None) -> int:
    """Return the query-key pairs in the tiles of a document, masked ones included: the sum of n N."""
    left = None if window is None or window >= length else window - 1
    return sum((end - start) * (end - key) for start, end, key in tiles(length, tile_length(length, groups), left))


MXFP4_NAMES = {"openai/gpt-oss-20b": "unsloth/gpt-oss-20b-BF16", "openai/gpt-oss-120b": "unsloth/gpt-oss-120b-BF16"}
"""Models that the hub has in MXFP4, which is not supported, and a bf16 copy of each."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    name: model["config"]
    for model in json.loads(resources.files("distlora.architecture").joinpath("known_models.json").read_text("utf-8"))
    for name in model["names"]
    if "source" not in model  # Those with one are of types that families.py does not list yet.
}
"""Settings of config.json by a model's name on the hub; of a gated original an open copy comes first."""


def architecture_named(name: str) -> Mapping[str, Any] | None:
    """Return the settings of a model by its name on the hub, in any case; None for an unknown model."""
    return {known.lower(): settings for known, settings in ARCHITECTURES.items()}.get(name.lower())


def nearest_architecture(name: str) -> str:
    """Return ` (did you mean ...?)` for a name that may be a mistyped known model."""
    return nearest(name, ARCHITECTURES, cutoff=0.87)


LOGITS_PER_CHUNK = 2**24
"""fp32 logits that exist at once (64 MiB). A chunk has this many over the vocabulary size in tokens, 16 or more."""
LOGITS_PER_CHUNK_ON_CPU = 2**20
"""The same on a CPU, where a chunk's memory, five times its logits, stays in the caches. A chunk has at least
FEWEST_ON_CPU tokens, because each reads the whole weight."""
FEWEST_ON_CPU = 128

ADDED_AT_ONCE = 2**22
"""Elements of a trained head's bf16 gradient that are added to the fp32 sum at once: a CPU widens them first."""


def tokens_per_chunk(vocabulary: int, *, on_cpu: bool) -> int:
    """Return the number of tokens whose logits exist at once."""
    tokens = LOGITS_PER_CHUNK // vocabulary
    if on_cpu:
        tokens = min(tokens, max(FEWEST_ON_CPU, LOGITS_PER_CHUNK_ON_CPU // vocabulary))
    return max(16, tokens)
