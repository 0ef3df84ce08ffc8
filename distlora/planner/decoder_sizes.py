"""Read the sizes of decoder layers from config.json, their adapter ranks, and the kernels that they use. No torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from distlora.architecture.shapes import Asked, ModelShapes, computed_pairs
from distlora.architecture.spec import Architecture, LayerKind
from distlora.planner.workload import Workload
from distlora_kernels import native


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
    kinds: dict[object, AdaptedRanks] = {}
    found = []
    for block in shapes.adapters(asked.config):
        by_kind = sorted(block, key=lambda each: each.experts)  # Of names alike those of experts count.
        ranks = {each.place.rpartition(".")[2]: each.rank for each in by_kind}
        ranks |= {each.place: each.rank for each in block}
        numels = {each.place.rpartition(".")[2]: each.numel for each in by_kind if each.experts > 1}
        key = (*ranks.items(), *numels.items())
        found.append(kinds.setdefault(key, AdaptedRanks(by_name=ranks, numels=numels)))
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
    degree: int = 1
    """Ranks that divide the experts."""

    @property
    def local(self) -> int:
        """Number of experts that a rank computes."""
        return self.count // self.degree

    @classmethod
    def of(cls, architecture: Architecture, kind: LayerKind, degree: int = 1) -> ExpertSizes | None:
        """Return the sizes of the experts in a kind of layer; None without experts."""
        if kind.experts is None:
            return None
        down = next(weight for weight in kind.weights if weight.path == kind.experts.paths[-1])
        has_biases = any(weight.path == f"{down.path}_bias" for weight in kind.weights)
        softmax: Literal["fp32", "fp32 weights"] = "fp32"
        if architecture.model_type == "mixtral":  # Its router gives weights in fp32; no module's attribute says so.
            softmax = "fp32 weights"
        return cls(
            count=kind.experts.num_experts,
            chosen=kind.experts.chosen,
            inner=down.shape[-1],
            clamps=has_biases,
            router="chosen" if has_biases else softmax,
            degree=degree,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaledHalf:
    """A half of a layer, estimated from a shrunk model's by the columns of its matrices (`HalfMemory`)."""

    keeps: tuple[float, float]
    """Bytes per token of a bf16 run, and further bytes for each token of the sequence."""
    inputs: float
    forward: tuple[float, float]
    backward: tuple[float, float]
    linears: tuple[tuple[str, int, int, int, int], ...]
    """(path, input columns, output columns, rows per token, experts) of each linear or weight of experts."""

    @classmethod
    def of(cls, kind: LayerKind, half: int) -> ScaledHalf | None:
        """Return the estimate of a half; None if formulas hold."""
        memory, experts = kind.memory[half], kind.experts
        if memory is None:
            return None
        scale = kind.columns(half) / max(1, memory.columns)
        keeps, forward, backward = (
            (scale * pair[0], scale * pair[1]) for pair in (memory.keeps, memory.forward, memory.backward)
        )
        linears: list[tuple[str, int, int, int, int]] = []
        for weight in kind.weights:
            if weight.packs and kind.half_of(weight.path) == half:
                rows = (experts.chosen, experts.num_experts) if weight.kind == "experts" and experts else (1, 1)
                *_, columns, inputs = weight.shape
                linears.append((weight.path.removesuffix(".weight"), inputs, columns, *rows))
        return cls(keeps=keeps, inputs=memory.inputs, forward=forward, backward=backward, linears=tuple(linears))


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """The sizes of a kind of decoder layer."""

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
    head_form: Literal["plain", "softcap", "scale", "own"] = "plain"
    """What makes logits of the product with the LM head (distlora.architecture.spec.HeadForm)."""
    sinks: bool = False
    """True if attention has sinks (GPT-OSS)."""
    masks: int = 1
    """Number of attention masks: one per layer type (causal, with a window)."""
    experts: ExpertSizes | None = None
    shared: tuple[str, int] | None = None
    """Path and inner columns of the gated MLP that all tokens go through beside the experts."""
    halves: tuple[ScaledHalf | None, ScaledHalf | None] = (None, None)
    """Estimates of (attention or mixer, MLP) for which there are no formulas."""

    attends: bool = True
    """True if the layer has softmax attention."""

    @property
    def head_size(self) -> int:
        """Columns of one attention head."""
        return self.queries // self.heads

    @property
    def mlp_columns(self) -> int:
        """Inner columns that a token goes through."""
        return self.inner * (1 if self.experts is None else self.experts.chosen)

    @classmethod
    def of(cls, architecture: Architecture, kind: LayerKind | None = None, *, expert_degree: int = 1) -> Decoder:
        """Return the sizes of a kind of layer, by default the largest. Without heads it has those of another kind.

        `expert_degree`: parallel.expert_degree.
        """
        kind = kind or architecture.largest
        experts = ExpertSizes.of(architecture, kind, expert_degree)
        heads, key_heads, head_size = next(
            (each.heads for each in (kind, *architecture.kinds) if each.heads), (1, 1, architecture.hidden)
        )
        shapes = {weight.path.removesuffix(".weight").rpartition(".")[2]: weight.shape for weight in kind.weights}
        biases = {path.removesuffix(".bias").rpartition(".")[2] for path in kind.paths if path.endswith(".bias")}
        sinks = "sinks" in shapes
        return cls(
            hidden=architecture.hidden,
            inner=shapes.get("down_proj", (0,))[-1] if experts is None else experts.inner,
            queries=heads * head_size,
            keys=key_heads * head_size,
            heads=heads,
            key_heads=key_heads,
            layers=architecture.num_layers,
            vocabulary=architecture.vocabulary,
            norms_after=kind.mlp is not None and kind.mlp[2] is not None,
            head_norms="q_norm" in shapes,
            fused_linears="qkv_proj" in shapes,
            qkv_bias=bool(biases & {"q_proj", "qkv_proj"}),
            o_bias="o_proj" in biases,
            mlp_bias="down_proj" in biases,
            norms_in_fp32=architecture.norm_form == "gemma",
            caps_scores=architecture.attention == "eager" and not sinks,
            head_form=architecture.head_form.kind,
            sinks=sinks,
            masks=len({each.window is None for each in architecture.kinds if each.heads}),
            experts=experts,
            attends=kind.heads is not None,
            shared=shared_expert(kind),
            halves=(ScaledHalf.of(kind, 0), ScaledHalf.of(kind, 1)),
        )


def shared_expert(kind: LayerKind) -> tuple[str, int] | None:
    """Return the path and inner columns of a gated MLP beside the experts of a layer; None without one."""
    for weight in kind.weights if kind.experts else ():
        if weight.kind == "linear" and weight.path.endswith(".down_proj.weight") and kind.half_of(weight.path) == 1:
            return weight.path.removesuffix(".down_proj.weight"), weight.shape[-1]
    return None


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
    """Ranks by name and by path in the layer, added up over trials trained together."""
    of_one: Mapping[str, int] | None = None
    """The largest rank of one trial; None for a single trial."""
    numels: Mapping[str, int] = field(default_factory=dict)
    """Elements of A and B of experts by name, of a single trial."""

    def rank(self, name: str) -> int:
        """Return the rank of one linear, 0 without an adapter."""
        return self.by_name.get(name, 0)

    def largest(self, name: str) -> int:
        """Return the largest rank that one trial has on one linear."""
        return (self.by_name if self.of_one is None else self.of_one).get(name, 0)

    def reading(self, tensor: str) -> int:
        """Return the sum of the ranks of the linears that read one tensor, a key of INPUTS."""
        return sum(self.rank(name) for name in INPUTS[tensor])


def formats_by_name(kind: LayerKind, formats: Sequence[str | None]) -> dict[str, str]:
    """Return the formats of a decoder layer's quantized weights by name and by path in the layer, as AdaptedRanks."""
    found: dict[str, str] = {}
    for weight, format in zip(kind.weights, formats, strict=True):
        if format is not None:
            path = weight.path.removesuffix(".weight")
            found |= {path.rpartition(".")[2]: format, path: format}
    return found


AttentionKind = Literal["documents", "tiles", "sdpa", "eager"]
"""`documents`: flash attention over each document's length. `tiles`: products of matrices over each (on a CPU;
attention.cpp is counted as that). `sdpa`: torch's with a dense mask, all pairs of a row. `eager`: the same, and the
scores of a row are tensors."""


def attention_kind(work: Workload, architecture: Architecture, decoder: Decoder, *, is_gpu: bool) -> AttentionKind:
    """Return the attention implementation that distlora.model.attention chooses, on a GPU that has the kernels."""
    if architecture.attention == "eager":
        return "eager"
    if not architecture.varlen or work.train.attention == "sdpa" or work.train.dtype != "bf16":
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


def fuses(work: Workload, architecture: Architecture, *, is_gpu: bool) -> bool:
    """Return True if norms are fused, by train.fused_kernels on a GPU or compiled on a CPU.

    MLPs and rotary embeddings are fused too if there is no DoRA. train.compile=auto counts the compiler of this node:
    runs on CPUs are planned on a node that runs them.
    """
    if work.adapter.method == "full" or architecture.has_experts or not architecture.fusible:
        return False
    if is_gpu:
        return work.train.fused_kernels != "none"
    return work.train.compile is True or (work.train.compile == "auto" and native.unavailable_reason() is None)
