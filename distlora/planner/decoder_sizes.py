"""Read the sizes of decoder layers from config.json, their adapter ranks, and the kernels that they use. No torch."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from distlora.architecture.shapes import AdapterShape, Asked, ModelShapes, computed_pairs
from distlora.architecture.spec import Architecture, FusiblePart, LayerKind, Weight
from distlora.planner.machine import Machine
from distlora.planner.workload import Workload
from distlora_kernels import native
from distlora_kernels.format_layouts import FORMAT_LAYOUTS
from distlora_kernels.fused_threshold import max_fused_rows


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
    paths: tuple[str, ...]
    """Paths of its linears and weights of experts."""

    @classmethod
    def of(cls, kind: LayerKind, half: int) -> ScaledHalf | None:
        """Return the estimate of a half; None if formulas hold."""
        memory = kind.memory[half]
        if memory is None:
            return None
        scale = kind.columns(half) / max(1, memory.columns)
        keeps, forward, backward = (
            (scale * pair[0], scale * pair[1]) for pair in (memory.keeps, memory.forward, memory.backward)
        )
        weights = (weight for weight in kind.weights if weight.packs and kind.half_of(weight.path) == half)
        paths = tuple(weight.path.removesuffix(".weight") for weight in weights)
        return cls(keeps=keeps, inputs=memory.inputs, forward=forward, backward=backward, paths=paths)


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
            caps_scores=architecture.attention == "eager" and not sinks,
            head_form=architecture.head_form.kind,
            sinks=sinks,
            masks=len({kind.window is None for kind in architecture.kinds if kind.heads}),
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
class LayerLinear:
    """A linear of a decoder layer, or a fused weight of its experts, with its adapter and its format."""

    path: str
    """Its path in the layer."""
    inputs: int
    outputs: int
    """Columns of its input and output; of experts those of one."""
    has_bias: bool = False
    format: str | None = None
    """Format of the weight; None: it is dense."""
    is_unread: bool = False
    """True if backward does not need its output (`LayerKind.unread`)."""
    rank: int = 0
    """Rank of its adapter, or of one expert's; of trials trained together the sum of all. 0 without an adapter."""
    largest: int = 0
    """Largest rank of one trial."""
    experts: int = 1
    local: int = 1
    """Experts, and how many of them a rank computes."""
    chosen: int = 1
    """Experts that a token goes through."""
    adapter_numel: int = 0
    """Elements of A and B of all experts."""

    @property
    def is_experts(self) -> bool:
        """True of a fused weight, of which a rank may have one expert."""
        return self.experts > 1 or self.chosen > 1

    @property
    def numel(self) -> int:
        """Number of elements on a rank."""
        return self.local * self.outputs * self.inputs

    @property
    def packed_bytes(self) -> int:
        """Bytes on a rank in its format, which it has."""
        layout = FORMAT_LAYOUTS[self.format or ""]
        return layout.num_groups((self.local * self.outputs, self.inputs)) * layout.group_bytes


Linears = Mapping[str, tuple[LayerLinear, ...]]
"""Linears of a layer by what they read, a key of INPUTS, without those of a shared expert; each alone by its path."""


@dataclass(frozen=True, slots=True, eq=False)
class PlannedLayer:
    """A decoder layer of a run."""

    kind: LayerKind
    decoder: Decoder
    linears: Linears


def layers_of(work: Workload, shapes: ModelShapes) -> list[PlannedLayer]:
    """Return the decoder layers of a run; those that are alike are one object."""
    architecture, known = shapes.architecture, dict[object, PlannedLayer]()
    adapted = work.adapters if work.adapter.method != "full" else ()
    adapters = [_adapters_by_layer(Asked(shapes, adapter)) for adapter in adapted]
    planned = []
    for index, (number, formats) in enumerate(shapes.layer_formats(work.format)):
        own, formats = [layers[index] for layers in adapters], () if index < work.dense_layers else formats
        key = (number, formats, *map(id, own))
        if key not in known:
            kind = architecture.kinds[number]
            decoder = Decoder.of(architecture, kind, expert_degree=work.expert_degree)
            known[key] = PlannedLayer(kind, decoder, linears_of(decoder, kind, formats, own))
        planned.append(known[key])
    return planned


def linears_of(
    decoder: Decoder,
    kind: LayerKind,
    formats: Sequence[str | None] = (),
    adapters: Sequence[Mapping[str, AdapterShape]] = (),
) -> Linears:
    """Return the linears of a layer. `formats`: of its weights, () if all are dense. `adapters`: by path, per trial."""
    groups: dict[str, tuple[LayerLinear, ...]] = {}
    for weight, format in itertools.zip_longest(kind.weights, formats):
        if weight.packs:
            path = weight.path.removesuffix(".weight")
            groups[path] = (_linear(path, weight, format, decoder.experts, kind, adapters),)
    shared = "-" if decoder.shared is None else f"{decoder.shared[0]}."
    own = {path.rpartition(".")[2]: each for path, (each,) in groups.items() if not path.startswith(shared)}
    return groups | {read: tuple(each for name, each in own.items() if name in names) for read, names in INPUTS.items()}


def _linear(
    path: str,
    weight: Weight,
    format: str | None,
    sizes: ExpertSizes | None,
    kind: LayerKind,
    adapters: Sequence[Mapping[str, AdapterShape]],
) -> LayerLinear:
    *count, outputs, inputs = weight.shape
    own = [trial[path] for trial in adapters if path in trial]
    ranks = [adapter.rank for adapter in own] or [0]
    experts = sizes if weight.kind == "experts" else None
    # Trials may share other factors, so that each expert has a copy of all.
    copied = 0 if experts is None else experts.count * sum(ranks) * (inputs + outputs)
    return LayerLinear(
        path=path,
        inputs=inputs,
        outputs=outputs * (math.prod(count) if experts is None else 1),
        has_bias=f"{path}.bias" in kind.paths,
        format=format,
        is_unread=path in kind.unread,
        rank=sum(ranks),
        largest=max(ranks),
        experts=1 if experts is None else experts.count,
        local=1 if experts is None else experts.local,
        chosen=1 if experts is None else experts.chosen,
        adapter_numel=own[0].numel if len(adapters) == 1 and own else copied,
    )


@functools.lru_cache(maxsize=16)
def _adapters_by_layer(asked: Asked) -> tuple[Mapping[str, AdapterShape], ...]:
    """Return the adapters of each layer by path in it; layers that are alike share one object."""
    known: dict[object, Mapping[str, AdapterShape]] = {}
    of_layers = []
    for layer in asked.shapes.adapters(asked.config):
        by_path = {adapter.place: adapter for adapter in layer}
        of_layers.append(
            known.setdefault(tuple((path, adapter.rank, adapter.numel) for path, adapter in by_path.items()), by_path)
        )
    return tuple(of_layers)


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


def pairs_computed(kind: AttentionKind, length: int, window: int | None, groups: int) -> int:
    """Return the query-key pairs of a document that a layer computes, masked ones too.

    `groups`: query heads per key head.
    """
    if kind == "documents":
        return pairs(length, window)
    return computed_pairs(length, groups, window) if kind == "tiles" else length**2


def fused_parts(work: Workload, architecture: Architecture, *, is_gpu: bool) -> frozenset[FusedPart]:
    """Return the parts that are fused, by train.fused_kernels on a GPU or compiled on a CPU.

    With DoRA, MLPs and rotary embeddings would overwrite what gradients read. train.compile=auto counts the compiler of
    this node: runs on CPUs are planned on a node that runs them.
    """
    compiles = work.train.compile is True or (work.train.compile == "auto" and native.unavailable_reason() is None)
    used = work.train.fused_kernels != "none" if is_gpu else compiles and architecture.compilable
    if work.adapter.method == "full" or not used:
        return frozenset()
    parts: set[FusedPart] = {"loss", *architecture.fusible}
    return frozenset(parts & {"loss", "norms"} if work.adapter.use_dora else parts)


FusedPart = FusiblePart | Literal["loss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelOptions:
    """The kernels of a run, by its settings and its device."""

    itemsize: int = 2
    """Bytes of an element of train.dtype."""
    is_gpu: bool = True
    attention: AttentionKind = "documents"
    fused: frozenset[FusedPart] = frozenset()
    """Parts that are fused in every layer; the loss if logits are plain."""
    norms_in_fp32: bool = False
    """True if norms multiply by their scale in fp32 (Gemma)."""
    dora: bool = False
    dropout: bool = False
    """True if adapters have dropout. Masks are not kept; on the CPU, and with DoRA, they are tensors."""
    trains_base: bool = False
    """True if norms and linears are trained themselves (adapter=full)."""
    trials: int = 1
    """Trials trained together: their adapters are side by side, and each row uses one of them."""
    few_rows: int = 0
    """Up to so many rows a weight in NF4 is decoded inside its product; 0: never."""
    extends: bool = False
    """True if base products may take the adapter's term as further columns (distlora_kernels.extension)."""
    copies: bool = False
    """True if products read copies of the adapters of this step (AdapterCopies)."""

    @classmethod
    def planned(
        cls, work: Workload, shapes: ModelShapes, machine: Machine, sizes: Decoder | None = None, **more: Any
    ) -> Self:
        """Return the options of a workload for a kind of layer, by default the largest. `more`: further fields."""
        architecture, adapter = shapes.architecture, work.adapter
        decodes = machine.is_gpu and work.train.dtype == "bf16"
        return cls(
            itemsize=work.itemsize,
            is_gpu=machine.is_gpu,
            attention=attention_kind(work, architecture, sizes or Decoder.of(architecture), is_gpu=machine.is_gpu),
            fused=fused_parts(work, architecture, is_gpu=machine.is_gpu),
            norms_in_fp32=architecture.norm_form == "gemma",
            dora=adapter.use_dora,
            dropout=adapter.lora_dropout > 0,
            trains_base=adapter.method == "full",
            trials=len(work.adapters),
            few_rows=max_fused_rows(machine.capability) if decodes else 0,
            extends=decodes and len(work.adapters) == 1 and not (adapter.use_dora or adapter.lora_dropout),
            copies=copied_adapters(work, shapes, machine)[0] > 0,
            **more,
        )


def copied_adapters(work: Workload, shapes: ModelShapes, machine: Machine) -> tuple[int, int]:
    """Return the number of linears whose adapters are copied once per step, and the bytes of the copies.

    distlora.model.adapters.AdapterCopies has them: on a GPU, for one trial, in 16 bits.
    """
    itemsize = work.itemsize
    if not machine.is_gpu or itemsize == 4 or len(work.adapters) > 1 or work.adapter.method == "full":
        return 0, 0
    copied = [(adapter, count) for adapter, count in shapes.alike(work.adapter) if adapter.experts == 1]
    nbytes = sum(count * sum(itemsize * -(-n // 8) * 8 for n in adapter.numels[:2]) for adapter, count in copied)
    return sum(count for _, count in copied), nbytes
