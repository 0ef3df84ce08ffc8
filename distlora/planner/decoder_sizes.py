"""Read the sizes of decoder layers from config.json, their adapter ranks, and the kernels that they use. No torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from distlora.architecture.families import Family, text_settings
from distlora.architecture.shapes import Asked, Biases, ModelShapes, attention_columns, computed_pairs, sizes_of
from distlora.planner.workload import Workload


def ranks_of_blocks(work: Workload, shapes: ModelShapes) -> tuple[AdaptedRanks, ...]:
    """Return the adapter ranks of each decoder layer; layers that are alike share one object."""
    if work.adapter.method == "full":
        return (AdaptedRanks(),) * shapes.num_layers
    found = [_ranks_of_blocks(Asked(shapes, adapter)) for adapter in work.adapters]
    if len(found) == 1:
        return found[0]
    kinds: dict[tuple[int, ...], AdaptedRanks] = {}
    blocks = []
    for trials in zip(*found, strict=True):
        key = tuple(map(id, trials))
        if key not in kinds:
            names = {name for each in trials for name in each.by_name}
            kinds[key] = AdaptedRanks(
                by_name={name: sum(each.rank(name) for each in trials) for name in names},
                of_one={name: max(each.rank(name) for each in trials) for name in names},
            )
        blocks.append(kinds[key])
    return tuple(blocks)


@functools.lru_cache(maxsize=16)
def _ranks_of_blocks(asked: Asked) -> tuple[AdaptedRanks, ...]:
    shapes = asked.shapes
    experts = {weight.path: math.prod(weight.shape[:-2]) for weight in shapes.block}
    kinds: dict[object, AdaptedRanks] = {}
    found = []
    for block in shapes.adapters(asked.config):
        ranks = {each.place.rpartition(".")[2]: each.down[0] // experts.get(each.place, 1) for each in block}
        found.append(kinds.setdefault(tuple(ranks.items()), AdaptedRanks(by_name=ranks)))
    return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSizes:
    """A mixture of experts in the place of each block's MLP."""

    count: int
    chosen: int
    """Experts that a token chooses, and rows per token."""
    inner: int
    """Columns of one expert's gate, up and their product."""
    clamps: bool
    """True if gate and up are clamped and up has 1 added (GPT-OSS)."""
    router: Literal["fp32", "fp32 weights", "chosen"]
    """Softmax over all experts in fp32, also with weights that stay in fp32 (Mixtral), or over the chosen (GPT-OSS)."""

    @classmethod
    def of(cls, settings: Mapping[str, Any], family: Family) -> ExpertSizes | None:
        """Read the sizes of experts from the content of config.json; None without experts."""
        layout = family.experts
        if layout is None:
            return None
        is_gpt_oss = family.model_type == "gpt_oss"
        softmax: Literal["fp32", "fp32 weights"] = "fp32 weights" if family.model_type == "mixtral" else "fp32"
        return cls(
            count=layout.num_experts(settings),
            # What MixtralConfig, Qwen3MoeConfig and GptOssConfig take where config.json does not say.
            chosen=settings.get("num_experts_per_tok", {"mixtral": 2, "gpt_oss": 4}.get(family.model_type, 8)),
            inner=settings[layout.intermediate],
            clamps=is_gpt_oss,
            router="chosen" if is_gpt_oss else softmax,
        )


_ALTERNATING = ("gemma2", "gemma3_text", "gemma3", "gpt_oss")
"""Families whose layers alternate between a window and none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """The sizes of a decoder whose blocks are all alike."""

    hidden: int
    inner: int
    """Columns of gate, up and their product; of one expert in a mixture."""
    queries: int
    """Columns of the queries: heads x head size."""
    keys: int
    """Columns of the keys, and of the values."""
    heads: int
    key_heads: int
    layers: int
    vocabulary: int
    norms_after: bool
    """True if a norm follows attention and another the MLP (Gemma)."""
    head_norms: bool
    """True if queries and keys have norms."""
    fused_linears: bool = False
    """True if queries, keys and values are one linear, and gate and up another (Phi-3)."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    norms_in_fp32: bool = False
    """True if norms multiply by their scale in fp32 (Gemma)."""
    caps_scores: bool = False
    """True if attention caps its scores (Gemma 2)."""
    caps_logits: bool = False
    """True if the LM head caps its logits (Gemma)."""
    sinks: bool = False
    """True if attention has sinks (GPT-OSS)."""
    masks: int = 1
    """Number of attention masks: one per layer type (causal, with a window)."""
    experts: ExpertSizes | None = None

    @property
    def head_size(self) -> int:
        """Columns of one attention head."""
        return self.queries // self.heads

    @property
    def mlp_columns(self) -> int:
        """Inner columns that a token goes through."""
        return self.inner * (1 if self.experts is None else self.experts.chosen)

    @classmethod
    def of(cls, model: Mapping[str, Any], family: Family) -> Decoder:
        """Read the sizes from the content of config.json."""
        settings = sizes_of(model, family)
        heads, (queries, keys) = settings["num_attention_heads"], attention_columns(settings)
        experts, kind = ExpertSizes.of(settings, family), family.model_type
        biases, softcaps = Biases.of(family, settings), text_settings(model, family)
        types, masks = settings.get("layer_types"), 1
        if family.layer_types:
            # Without a list in config.json, the layers of Gemma and GPT-OSS alternate, and Qwen's have no window.
            masks = len(set(types)) if types else 2 if kind in _ALTERNATING else 1
        return cls(
            hidden=settings["hidden_size"],
            inner=settings["intermediate_size"] if experts is None else experts.inner,
            queries=queries,
            keys=keys,
            heads=heads,
            key_heads=keys // (queries // heads),
            layers=settings["num_hidden_layers"],
            vocabulary=settings["vocab_size"],
            norms_after=family.mlp_norms[1] is not None,
            head_norms=family.head_norms,
            fused_linears=kind == "phi3",
            qkv_bias=biases.qkv,
            o_bias=biases.o,
            mlp_bias=biases.mlp,
            norms_in_fp32=kind.startswith("gemma"),
            # 50 where config.json does not say; null: none.
            caps_scores=kind == "gemma2" and softcaps.get("attn_logit_softcapping", 50.0) is not None,
            # 30 or none where config.json does not say.
            caps_logits=family.head_softcap
            and softcaps.get("final_logit_softcapping", 30.0 if kind == "gemma2" else None) is not None,
            sinks=kind == "gpt_oss",
            masks=masks,
            experts=experts,
        )


_WINDOWS = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096, "qwen3_moe": 4096, "gemma2": 4096, "gpt_oss": 128}
_WINDOWS |= {"gemma3": 4096, "gemma3_text": 4096}
"""What transformers takes where a config.json says no sliding_window."""
_WINDOW_IS_ASKED_FOR = ("qwen2", "qwen3", "qwen3_moe")
"""Families whose sliding_window counts with use_sliding_window=true alone."""


def windows_of(model: Mapping[str, Any], family: Family) -> list[int | None]:
    """Return the attention window of each layer in tokens, as transformers reads config.json; None: no window."""
    settings, layers = text_settings(model, family), sizes_of(model, family)["num_hidden_layers"]
    window = settings.get("sliding_window", _WINDOWS.get(family.model_type))
    if family.model_type in _WINDOW_IS_ASKED_FOR and not settings.get("use_sliding_window"):
        window = None
    types = settings.get("layer_types")
    if types is not None:
        return [window if kind == "sliding_attention" else None for kind in types]
    slides: Iterable[bool] = [True] * layers
    match family.model_type:
        case "gemma2" | "gpt_oss":
            slides = (layer % 2 == 0 for layer in range(layers))
        case "gemma3" | "gemma3_text":
            slides = ((layer + 1) % settings.get("sliding_window_pattern", 6) != 0 for layer in range(layers))
        case "qwen2" | "qwen3":
            slides = (layer >= settings.get("max_window_layers", 28) for layer in range(layers))
    return [window if each else None for each in slides]


INPUTS = {
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj", "gate_up_proj"),
    "down": ("down_proj",),
}
"""The linears of a block, by the tensor that they read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedRanks:
    """Adapter ranks of a decoder layer by the names of linears and fused expert weights (the rank of one expert)."""

    by_name: Mapping[str, int] = field(default_factory=dict)
    """Ranks by name, added up over trials trained together."""
    of_one: Mapping[str, int] | None = None
    """The largest rank of one trial; None for a single trial."""

    def rank(self, name: str) -> int:
        """Return the rank of one linear, 0 without an adapter."""
        return self.by_name.get(name, 0)

    def largest(self, name: str) -> int:
        """Return the largest rank that one trial has on one linear."""
        return (self.by_name if self.of_one is None else self.of_one).get(name, 0)

    def reading(self, tensor: str) -> int:
        """Return the sum of the ranks of the linears that read one tensor, a key of INPUTS."""
        return sum(self.rank(name) for name in INPUTS[tensor])


AttentionKind = Literal["documents", "tiles", "sdpa", "eager"]
"""`documents`: flash attention over each document's length. `tiles`: products of matrices over each (on a CPU;
attention.cpp is counted as that). `sdpa`: torch's with a dense mask, all pairs of a row. `eager`: the same, and the
scores of a row are tensors."""


def attention_kind(work: Workload, family: Family, decoder: Decoder, *, is_gpu: bool) -> AttentionKind:
    """Return the attention implementation that distlora.model.attention chooses, on a GPU that has the kernels."""
    if family.attention == "eager":
        return "eager"
    if work.train.attention == "sdpa" or work.train.dtype != "bf16":
        return "sdpa"
    if not is_gpu:
        return "tiles"
    return "documents" if decoder.head_size % 8 == 0 and decoder.head_size <= 256 else "sdpa"


def pairs(length: int, window: int | None) -> int:
    """Return the query-key pairs of causal attention in a document, with window - 1 tokens before each."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def pairs_computed(kind: AttentionKind, documents: Sequence[int], window: int | None, groups: int) -> int:
    """Return the query-key pairs that a layer computes, masked ones too. `groups`: query heads per key head."""
    if kind == "documents":
        return sum(pairs(length, window) for length in documents)
    if kind == "tiles":
        return sum(computed_pairs(length, groups, window) for length in documents)
    return sum(documents) ** 2


def scores_again(kind: AttentionKind) -> tuple[int, int]:
    """Return how often forward and backward recompute the scores; the forward of tiles computes them twice."""
    return {"documents": (0, 1), "tiles": (1, 1), "sdpa": (0, 1), "eager": (0, 0)}[kind]


def fuses(work: Workload, family: Family, *, is_gpu: bool, has_liger: bool) -> bool:
    """Return True if norms are fused, by liger-kernel on a GPU or by torch.compile on a CPU.

    MLPs and rotary embeddings are fused too if there is no DoRA.
    """
    if work.adapter.method == "full" or family.experts is not None:
        return False
    return work.train.liger and has_liger if is_gpu else work.train.compile
