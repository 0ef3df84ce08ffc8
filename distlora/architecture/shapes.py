"""Derive the shapes of a model's weights from its config.json, before it is downloaded or built. Imports no torch."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from distlora.architecture.spec import Architecture, Weight, architecture_of
from distlora.architecture.targets import select_adapted
from distlora.config import AdapterConfig, nearest
from distlora_kernels.format_layouts import GROUP, labels, shards_whole_experts

_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """The adapter of a linear, or of a fused weight of E experts.

    A fused weight's A has E x r rows, and its B E x r columns. A factor that all experts share has r.
    """

    path: str
    """Hugging Face path of what it adapts."""
    down: tuple[int, int]
    """Shape of A."""
    up: tuple[int, int]
    """Shape of B."""
    magnitude: int = 0
    """Numbers of DoRA's magnitude."""
    experts: int = 1
    """Experts of a fused weight; 1 for a linear."""
    chosen: int = 1
    """Experts among them that a token chooses."""

    @property
    def active(self) -> int:
        """Rows of A that a token goes through."""
        return self.rank * self.chosen

    @property
    def rank(self) -> int:
        """Rank of the linear, or of one expert: at most one of A and B is shared."""
        return max(self.down[0], self.up[1]) // self.experts

    @property
    def stored(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B in files, which have a copy of a shared factor per expert."""
        rows = self.rank * self.experts
        return (rows, self.down[1]), (self.up[0], rows)

    @property
    def place(self) -> str:
        """The path in its block."""
        return _LAYER.split(self.path, maxsplit=1)[1]

    @property
    def numels(self) -> tuple[int, ...]:
        """Number of elements of each parameter."""
        own = (math.prod(self.down), math.prod(self.up))
        return (*own, self.magnitude) if self.magnitude else own

    @property
    def numel(self) -> int:
        """Number of elements."""
        return sum(self.numels)


KEEP = "keep"
"""Workload.format of quant=keep, which stands for each weight's own."""
Formats = tuple[str | None, ...]
"""Formats of the weights of one decoder layer (distlora_kernels.formats), None for a dense one."""


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """The shapes of a model's weights, with the rows of its new tokens."""

    architecture: Architecture
    vocabulary: int
    """Rows of the embedding and of the head."""
    formats: Mapping[int, Mapping[str, str | None]] = field(default_factory=dict)
    """Formats of weights (None: dense) by path, by number of the layer, where they are not those of all: a checkpoint
    keeps weights as they are shipped."""
    kept: Mapping[int, Mapping[str, str | None]] = field(default_factory=dict)
    """Formats of the weights that quant=keep keeps, as `formats`."""
    kept_tokens: tuple[str | None, str | None] = (None, None)
    """Formats in which it keeps embedding and LM head (None: dense), unless they or rows of them are trained."""

    def layer_formats(self, default: str | None) -> list[tuple[int, Formats]]:
        """Return each layer's kind and the formats of its weights in the kind's order.

        `default`: format of all other large weights of the layers; None: all weights are dense. KEEP: those of `kept`
        have formats, all others are dense.
        """
        kinds, by_layer = self.architecture.kinds, self.formats if default is not None else {}
        if default == KEEP:
            default, by_layer = None, self.kept

        def of(kind: int, exceptions: Mapping[str, str | None]) -> Formats:
            return tuple(exceptions.get(each.path, default) if each.packs else None for each in kinds[kind].weights)

        plain = [of(kind, {}) for kind in range(len(kinds))]
        return [
            (kind, of(kind, by_layer[index]) if index in by_layer else plain[kind])
            for index, kind in enumerate(self.architecture.kind_of_layer)
        ]

    @property
    def kept_formats(self) -> str:
        """Names of the formats of `kept` and `kept_tokens` in text for users."""
        formats = itertools.chain(self.kept_tokens, *(layer.values() for layer in self.kept.values()))
        return ", ".join(labels(sorted({format for format in formats if format})))

    @property
    def hidden(self) -> int:
        """Columns of the embedding."""
        return self.architecture.hidden

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.architecture.num_layers

    @property
    def tied(self) -> bool:
        """True if the head's weight is the embedding's."""
        return self.architecture.tied

    @property
    def block(self) -> tuple[Weight, ...]:
        """Weights of the largest kind of decoder layer."""
        return self.architecture.largest.weights

    @property
    def numel(self) -> int:
        """Parameters, a tied matrix once."""
        return self.architecture.numel + (self.vocabulary - self.architecture.vocabulary) * self.hidden * (
            1 if self.tied else 2
        )

    def quantized_numel(self, default: str | None, tokens: tuple[str | None, str | None] = (None, None)) -> int:
        """Return the number of parameters that have a format, `default` as in `layer_formats`.

        `tokens`: formats of embedding and LM head.
        """
        layers, kinds = self.layer_formats(default), self.architecture.kinds
        pairs = (zip(kinds[kind].weights, formats, strict=True) for kind, formats in layers)
        matrices = sum(format is not None for format in tokens[: 1 if self.tied else 2])
        return matrices * self.vocabulary * self.hidden + sum(
            weight.numel for layer in pairs for weight, format in layer if format is not None
        )

    def shards_whole_experts(self, default: str | None, ranks: int) -> bool | None:
        """Return whether so many ranks can divide the experts of all layers (parallel.expert_degree); None without any.

        `default` as in `layer_formats`.
        """
        kinds = self.architecture.kinds
        pairs = (zip(kinds[kind].weights, formats, strict=True) for kind, formats in set(self.layer_formats(default)))
        experts = [(weight.shape, format) for layer in pairs for weight, format in layer if weight.kind == "experts"]
        return all(shards_whole_experts(shape, format, ranks) for shape, format in experts) if experts else None

    def ties(self, config: AdapterConfig) -> bool:
        """Return True if a run has one matrix for embedding and LM head; a trained whole one is untied."""
        return self.tied and not config.modules_to_save

    def adapters(self, config: AdapterConfig) -> tuple[tuple[AdapterShape, ...], ...]:
        """Return the adapters of each decoder layer.

        Raises UserError if the targets match nothing (`select_adapted`).
        """
        return _adapters(Asked(self, config))

    def alike(self, config: AdapterConfig) -> tuple[tuple[AdapterShape, int], ...]:
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
def _adapters(request: Asked) -> tuple[tuple[AdapterShape, ...], ...]:
    """Return the adapters of each decoder layer.

    Cached: choosing settings of a 405B model would match 882 paths for each of hundreds of plans.
    """
    architecture, config = request.shapes.architecture, request.config
    adaptable = dict(architecture.adaptable())
    prefix = architecture.layer_prefix
    blocks: list[list[AdapterShape]] = [[] for _ in range(architecture.num_layers)]
    for path in select_adapted(config, architecture):
        *experts, out, inner = adaptable[path].shape
        rank, shared = config.rank_of(path), config.shared_factor(path) if experts else None
        rows, columns = (rank if shared == factor else math.prod(experts) * rank for factor in "AB")
        layer = int(path.removeprefix(prefix).partition(".")[0])
        layout = architecture.layer(layer).experts
        numbers = (layout.num_experts, layout.chosen) if experts and layout is not None else (1, 1)
        blocks[layer].append(AdapterShape(path, (rows, inner), (out, columns), out if config.use_dora else 0, *numbers))
    return tuple(map(tuple, blocks))


@functools.lru_cache(maxsize=16)
def _alike(request: Asked) -> tuple[tuple[AdapterShape, int], ...]:
    kinds: dict[object, list[AdapterShape]] = {}
    for block in _adapters(request):
        for adapter in block:
            kinds.setdefault((adapter.place, adapter.down, adapter.up, adapter.magnitude), []).append(adapter)
    return tuple((adapters[0], len(adapters)) for adapters in kinds.values())


def shapes_of(model: Mapping[str, Any], place: Path | str, *, vocabulary: int | None = None) -> ModelShapes:
    """Return the shapes of a model from its config.json (`read_config`).

    `place` is the file, for messages; `vocabulary` the rows of embedding and LM head if tokens are added. Raises
    UserError as `architecture_of`.
    """
    architecture = architecture_of(model, place)
    return ModelShapes(architecture, architecture.vocabulary if vocabulary is None else vocabulary)


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


_KNOWN = json.loads(resources.files("distlora.architecture").joinpath("known_models.json").read_text("utf-8"))
ARCHITECTURES: dict[str, dict[str, Any]] = {name: model["config"] for model in _KNOWN for name in model["names"]} | {
    name: model["config"] | {"quantization_config": quantization}
    for model in _KNOWN
    for name, quantization in model.get("quantized", {}).items()
}
"""Settings of config.json by a model's name on the hub; of a gated original an open copy comes first."""


def architecture_named(name: str) -> Mapping[str, Any] | None:
    """Return the settings of a model by its name on the hub, in any case; None for an unknown model."""
    return {known.lower(): settings for known, settings in ARCHITECTURES.items()}.get(name.lower())


def nearest_architecture(name: str) -> str:
    """Return ` (did you mean ...?)` for a name that may be a mistyped known model."""
    return nearest(name, ARCHITECTURES, cutoff=0.87)


CHUNK_BYTES = {"cuda": 448 * 2**20, "cpu": 96 * 2**20}
"""Most bytes of the logits that exist at once, unless CHUNK_MULTIPLE tokens take more. At a vocabulary of 128k a GPU's
are 512 tokens with fp32 copies, whose products take twice as long as reading the weight, and 1,024 in 16 bits alone."""
CHUNK_TOKENS = {"cuda": 1024, "cpu": 512}
"""Tokens from which a product with the LM head's weight, read once a chunk, is limited by arithmetic. A small
vocabulary takes more tokens at once, SMALL_CHUNK logits, because each chunk has its launches."""
SMALL_CHUNK = {"cuda": 2**24, "cpu": 2**20}
CHUNK_MULTIPLE = 128
"""Divisor of a chunk's tokens, and their least number."""
GRADIENT_PARTS = 8
"""Parts of a chunk whose gradients are taken one after the other, where torch computes the losses."""

DECODED_AT_ONCE = 2**24
"""Weights of a low-bit LM head that a product decodes at once, about: 32 MiB in bf16."""

ADDED_AT_ONCE = 2**22
"""Elements of a trained head's bf16 gradient that are added to the fp32 sum at once: a CPU widens them first."""
WIDENED_AT_ONCE = 1024
"""Tokens whose states or gradients are widened to fp32 at once, for a score or trained rows of tokens."""
CHECKED_AT_ONCE = {"cpu": 2**18, "cuda": 2**23}
"""Words of gathered weights that a checksum has as int64: 2 MiB on the CPU, which fits a core's cache, and 64 MiB on a
GPU."""


def logit_bytes(itemsize: int, *, plain: bool, compiled: bool, capped: bool, distills: bool = False) -> float:
    """Return the bytes that a logit takes in the LM head's forward and backward, beside what is kept of a token.

    `plain`: the logits are a frozen weight's product alone, whose loss is computed in place: in fp32 by torch, or
    `compiled` or fused in the run's dtype. Otherwise autograd has three fp32 copies, and the tanh of a cap.
    `distills`: there are fp32 logits of a teacher too, which become the gradient, and six tensors of a part of the
    tokens (distillation.py).
    """
    if distills:
        return 8 + 6 * 4 / GRADIENT_PARTS if plain else (20 if capped else 16)
    if not plain:
        return 16 if capped else 12
    return itemsize if compiled else (itemsize % 4) + 4 + 4 / GRADIENT_PARTS


def rows_at_once(vocabulary: int, hidden: int) -> int:
    """Return the rows of a low-bit LM head that a product decodes at once: whole groups, or all rows."""
    whole = math.lcm(hidden, GROUP) // hidden
    return min(max(DECODED_AT_ONCE // (whole * hidden), 1) * whole, vocabulary)


def tokens_per_chunk(vocabulary: int, logit_bytes: float, *, on_cpu: bool) -> int:
    """Return the number of tokens whose logits, of so many bytes each, exist at once."""
    device = "cpu" if on_cpu else "cuda"
    most = max(CHUNK_TOKENS[device], SMALL_CHUNK[device] // vocabulary)
    tokens = min(most, int(CHUNK_BYTES[device] / logit_bytes) // vocabulary)
    return max(CHUNK_MULTIPLE, tokens // CHUNK_MULTIPLE * CHUNK_MULTIPLE)


MOST_ROWS = {"cpu": 64, "cuda": 256}
"""Rows that generate together, by device type."""
CACHE_SHARE = 0.5
"""Part of the free memory that the keys and values of generation may take."""
DENSE_SHARE = 0.5
"""Part of the free memory that weights dequantized for generation may take."""
DENSE_ROWS = 64
"""Rows that a GPU decodes at once for which NF4 weights are decoded in each product, rather than once for all tokens.

By the costs of fused_threshold.py, which are predicted: up to here a fused product reads and decodes a weight once."""
