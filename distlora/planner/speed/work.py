"""Count the kernel launches of a decoder layer's linears: bytes of memory and operations. Imports no torch.

Each launch reads its operands and writes its result once; what stays in a cache between two is not counted. The
launches of linears that share an input are those of kernels/distlora_kernels/lora_gpu.py.

Letters: M rows (tokens), S rows of experts (M x experts that a token chooses), I in features, O out features, R rank,
E bytes of an element.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from distlora.planner.kernels import AttentionKind
from distlora.planner.traffic import packed_bytes

MovedKind = Literal[
    "dequantization",  # packed weights read, dense ones written
    "products",  # operands and results of the linears' products
    "adapters",  # of the adapters' products, their casts and gradients
    "elementwise",  # norms, activation functions, rotary embeddings, residuals
    "attention",  # queries, keys, values, outputs and their gradients; scores where they exist
    "head",  # its weight, logits, the embedding's rows
    "gathered",  # what is gathered, copied to where it is used
    "update",  # gradients added up and scaled, the optimizer
]
Unit = Literal["matrices", "attention", "decoding"]
"""What operations run at: a library's product, attention's kernel, a product that decodes a packed weight."""

FP32 = 4
_PART_ROWS = 256
"""Rows of dY that one fp32 part of B's gradient is summed over (skinny_triton.py)."""


@dataclass(frozen=True, slots=True)
class Work:
    """One launch, or several alike."""

    kind: MovedKind
    nbytes: float
    flops: float = 0.0
    unit: Unit = "matrices"
    launches: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class How:
    """Options of a run's computation."""

    itemsize: int
    """E, of train.dtype."""
    quantized: bool
    few_rows: int = 0
    """Up to so many rows a packed weight is decoded inside its product; 0: never."""
    keeps_dequantized: bool = False
    trains_base: bool = False
    """Whether the weights of the blocks have gradients (adapter=full)."""
    fused_norms: bool = False
    """Whether norms are liger-kernel's, or compiled."""
    fused: bool = False
    """Whether gated MLPs and rotary embeddings are."""
    is_gpu: bool = True
    """Else the head takes fewer tokens at once."""
    attention: AttentionKind = "documents"


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear of a block, or a fused weight of experts."""

    out: int
    features: int
    rank: int = 0
    """Of its adapter; of experts, of one. 0: it has none."""
    experts: int = 1
    chosen: int = 1
    """Experts that a token goes through."""
    is_dora: bool = False
    trials: int = 1
    """Of a pack: each row goes through the adapter of its own trial, of so many; `rank` is that of one,"""
    stacked: int = 0
    """and this of all together."""

    @property
    def others(self) -> int:
        """Columns of other trials' adapters."""
        return max(0, self.stacked - self.rank)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.experts * self.out * self.features

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weight in NF4."""
        return packed_bytes(self.numel, 1)

    @property
    def adapter_numel(self) -> int:
        """Number of elements of the adapter."""
        return self.experts * self.rank * (self.out + self.features)


def gemm(kind: MovedKind, m: int, n: int, k: int, how: How, *, accumulates: bool = False) -> Work:
    """Return a product (M, K) x (K, N) that reads both and writes the result; reads it too if it accumulates."""
    return Work(kind, how.itemsize * (m * k + k * n + m * n * (2 if accumulates else 1)), 2.0 * m * n * k)


def forward(group: Sequence[Linear], m: int, how: How, *, adapted: bool = True) -> Iterator[Work]:
    """Yield the launches of linears that read one tensor of M rows. `adapted`: False runs the base alone."""
    if group[0].experts > 1:
        yield from _experts_forward(group[0], m, how, adapted=adapted)
        return
    with_adapter = [linear for linear in group if linear.rank and adapted]
    yield from _casts(with_adapter, how)
    yield from _other_trials(with_adapter, 1, how)
    if with_adapter:
        yield gemm("adapters", m, sum(linear.rank for linear in with_adapter), group[0].features, how)
    for linear in group:
        has_adapter = linear in with_adapter
        if how.quantized and m <= how.few_rows:
            yield _decoded(linear, m, linear.rank * linear.out if has_adapter else 0, how)
            continue
        if how.quantized:
            yield _dequantize(linear, how)
        if has_adapter:
            yield gemm("adapters", m, linear.out, linear.rank, how)
        yield gemm("products", m, linear.out, linear.features, how, accumulates=has_adapter)
        if linear.is_dora and has_adapter:
            yield from _dora(linear, m, how, backward=False)


def backward(group: Sequence[Linear], m: int, how: How) -> Iterator[Work]:
    """Yield the launches for the gradients of the input, of adapters and of trained weights."""
    if group[0].experts > 1:
        yield from _experts_backward(group[0], m, how)
        return
    features, ranks = group[0].features, sum(linear.rank for linear in group)
    decodes = how.quantized and m <= how.few_rows
    yield from _casts([linear for linear in group if linear.rank], how)
    yield from _other_trials([linear for linear in group if linear.rank], 2, how)
    for index, linear in enumerate(group):
        if linear.rank:
            yield gemm("adapters", m, linear.rank, linear.out, how)
            yield _parts(linear, m)
        if decodes:
            yield _decoded(linear, m, linear.rank * features, how)
            if index > 0:
                yield Work("products", 3 * how.itemsize * m * features)
        else:
            if how.quantized and not how.keeps_dequantized:
                yield _dequantize(linear, how)
            yield gemm("products", m, features, linear.out, how, accumulates=ranks > 0 or index > 0)
        if how.trains_base:
            yield gemm("products", linear.out, features, m, how)
            # Added to what earlier micro-batches left, in fp32.
            yield Work("update", (how.itemsize + 2 * FP32) * linear.numel)
        if linear.is_dora and linear.rank:
            yield from _dora(linear, m, how, backward=True)
    if ranks:
        if not decodes:
            yield gemm("adapters", m, features, ranks, how)
        yield gemm("adapters", ranks, features, m, how)
        yield Work("adapters", 0.0)  # The second launch of a sum that is split.


def _casts(adapted: Sequence[Linear], how: How) -> Iterator[Work]:
    """Yield the casts of A and B from fp32 masters, s into B, and in backward of their gradients."""
    for linear in adapted:
        yield Work("adapters", (FP32 + how.itemsize) * linear.rank * linear.features)
        yield Work("adapters", (FP32 + how.itemsize) * linear.rank * linear.out)
        yield Work("adapters", 2 * FP32 * linear.rank * linear.out)


def _other_trials(adapted: Sequence[Linear], products: int, how: How) -> Iterator[Work]:
    """Yield the launches that adapters of other trials add to `products` products with A and B.

    Their weights are cast and read. Their rows are among the M rows of these products.
    """
    for linear in adapted:
        if linear.trials > 1:
            weights = linear.others * (linear.out + linear.features)
            yield Work(
                "adapters",
                (FP32 + (1 + products) * how.itemsize) * weights,
                launches=2 * products * (linear.trials - 1),
            )


def _dequantize(linear: Linear, how: How) -> Work:
    return Work("dequantization", linear.packed_bytes + how.itemsize * linear.numel)


def _decoded(linear: Linear, m: int, adapter: int, how: How) -> Work:
    """One product whose weight is decoded in it, with the adapter's term, of so many weights."""
    nbytes = linear.packed_bytes + how.itemsize * m * (linear.out + linear.features)
    return Work("products", nbytes, 2.0 * m * (linear.numel + adapter), "decoding")


def _parts(linear: Linear, m: int) -> Work:
    """B's gradient, in the pass over dY: one fp32 part for 256 rows, written and read again."""
    nbytes = 2.0 * FP32 * -(-m // _PART_ROWS) * linear.out * linear.rank
    return Work("adapters", nbytes, 2.0 * m * linear.rank * linear.out)


def _dora(linear: Linear, m: int, how: How, *, backward: bool) -> Iterator[Work]:
    """Norms, and magnitudes: folded into a packed weight, passes over y and dY for a dense one (kernels/README.md)."""
    out, features, rank = linear.out, linear.features, linear.rank
    if not backward:
        if how.quantized:
            nbytes = linear.packed_bytes + how.itemsize * rank * (out + features)
            yield Work("adapters", nbytes, 2.0 * rank * out * features, "decoding")
        else:
            yield gemm("adapters", out, rank, features, how)
        yield Work("adapters", FP32 * rank * (features + out) + 2 * FP32 * out)
    if not how.quantized:
        yield from [Work("adapters", 2 * how.itemsize * m * out)] * (2 if backward else 1)
        return
    blocks = out * features / 64
    yield Work("adapters", 5 * blocks)
    yield Work("adapters", 2 * FP32 * rank * out)
    yield Work("adapters", 3 * blocks, launches=0)
    if backward:
        yield Work("adapters", how.itemsize * m * out + 2 * FP32 * -(-m // _PART_ROWS) * out, launches=0)
        yield Work("adapters", 2 * FP32 * rank * out)


def _experts_forward(linear: Linear, m: int, how: How, *, adapted: bool) -> Iterator[Work]:
    """Yield the forward of a fused weight whose experts are one grouped product (experts_grouped.py)."""
    rows, e = linear.chosen * m, how.itemsize
    if how.quantized:
        yield _dequantize(linear, how)
    yield _grouped("products", linear, rows, linear.out, linear.features, how)
    if linear.rank and adapted:
        yield Work("adapters", (FP32 + e) * linear.adapter_numel, launches=2)
        yield _grouped("adapters", linear, rows, linear.rank, linear.features, how)
        yield _grouped("adapters", linear, rows, linear.out, linear.rank, how)
        yield Work("adapters", 3 * e * rows * linear.out)  # Added to the base's product.


def _experts_backward(linear: Linear, m: int, how: How) -> Iterator[Work]:
    rows, e = linear.chosen * m, how.itemsize
    if how.quantized and not how.keeps_dequantized:
        yield _dequantize(linear, how)
    yield _grouped("products", linear, rows, linear.features, linear.out, how)
    if linear.rank:
        yield Work("adapters", 2 * (FP32 + e) * linear.adapter_numel, launches=4)
        yield _grouped("adapters", linear, rows, linear.rank, linear.out, how)
        for size in (linear.features, linear.out):  # Gradients of A and of B.
            nbytes = e * (rows * (size + linear.rank) + linear.experts * linear.rank * size)
            yield Work("adapters", nbytes, 2.0 * rows * linear.rank * size)
        yield _grouped("adapters", linear, rows, linear.features, linear.rank, how)
        yield Work("adapters", 3 * e * rows * linear.features)


def _grouped(kind: MovedKind, linear: Linear, rows: int, n: int, k: int, how: How) -> Work:
    """Return a grouped product of (S, K) rows by the (K, N) matrices of all experts."""
    return Work(kind, how.itemsize * (rows * k + linear.experts * k * n + rows * n), 2.0 * rows * n * k)
