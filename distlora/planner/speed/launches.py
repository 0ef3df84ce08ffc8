"""List the kernel launches of a decoder layer, the LM head and the optimizer. Imports no torch.

Each launch reads its operands and writes its result once. The launches of linears are those of
kernels/distlora_kernels/lora_gpu.py; other operations are those that transformers' code calls (a norm: eight in fp32),
or a fused kernel (one). tests/planner/test_plan_work.py compares both.

Letters: M rows (tokens), S rows of experts (M x experts that a token chooses), E bytes of an element.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from distlora.architecture.shapes import GRADIENT_PARTS, logit_bytes, tokens_per_chunk
from distlora.planner.decoder_sizes import Decoder, KernelOptions, LayerLinear, PlannedLayer, ScaledHalf
from distlora.planner.flops import PAIR_BACKWARD, PAIR_FORWARD
from distlora.planner.memory.base import UPDATE_BYTES
from distlora_kernels import extension
from distlora_kernels.format_layouts import is_nf4

MovedKind = str
"""A category of device memory traffic: `dequantization`, `products` of linears, `adapters`, `elementwise`, `attention`,
`head`, `gathered` (copies after a gather), `update` (gradients and optimizer)."""
Unit = Literal["matrices", "attention", "decoding"]
"""What operations run at: a library's product, attention's kernel, a product that decodes a packed weight."""

FP32 = 4
SCORES_AGAIN = 2
"""Operations a pair and column by which scores are made again, in place of keeping them."""
_PART_ROWS = 256
"""Rows of dY that one fp32 part of B's gradient is summed over (skinny_triton.py)."""


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """One launch, or several alike."""

    kind: MovedKind
    nbytes: float
    flops: float = 0.0
    unit: Unit = "matrices"
    launches: int = 1
    padding: float = 0.0
    """Operations of a product that only fill up its last step, not among `flops`."""


def gemm(kind: MovedKind, m: int, n: int, k: int, how: KernelOptions, *, accumulates: bool = False) -> KernelLaunch:
    """Return a product (M, K) x (K, N) that reads both and writes the result; reads it too if it accumulates."""
    results = 2 if accumulates else 1
    return KernelLaunch(kind, how.itemsize * (m * k + k * n + results * m * n), 2.0 * m * n * k)


Pass = Literal["forward", "base alone", "recomputation", "backward"]
"""`base alone`: forward without adapters."""


def linears(
    group: Sequence[LayerLinear], m: int, how: KernelOptions, which: Pass = "forward"
) -> Iterator[KernelLaunch]:
    """Yield the launches of linears that read one tensor of M rows."""
    if not group:
        return iter(())
    if group[0].is_experts:
        return _experts_backward(group[0], m, how) if which == "backward" else _experts_forward(group[0], m, how, which)
    return _backward(group, m, how) if which == "backward" else _forward(group, m, how, which)


def _forward(group: Sequence[LayerLinear], m: int, how: KernelOptions, which: Pass) -> Iterator[KernelLaunch]:
    with_adapter = [linear for linear in group if linear.rank and which != "base alone"]
    skipped = [linear for linear in group if which == "recomputation" and skips(linear, how)]
    yield from _casts([linear for linear in with_adapter if linear not in skipped], how)
    if not how.copies:
        yield from (KernelLaunch("adapters", (FP32 + how.itemsize) * each.largest * each.inputs) for each in skipped)
    yield from _other_trials(with_adapter, 1, how)
    ranks, inputs = sum(linear.largest for linear in with_adapter), group[0].inputs
    extends = (
        how.extends
        and all(is_nf4(linear.format) and not _decodes(linear, m, how) for linear in with_adapter)
        and inputs % 64 == 0
        and extension.extends(
            m,
            written=sum(linear.outputs for linear in with_adapter),
            copied=inputs,
            rank=ranks,
            products=len(with_adapter),
            itemsize=how.itemsize,
        )
    )
    if with_adapter:
        yield gemm("adapters", m, ranks, inputs, how)
    if extends:  # The copy of the input, and x A^T once more for backward.
        yield KernelLaunch("adapters", how.itemsize * m * (inputs + ranks), launches=0)
    for linear in group:
        has_adapter = linear in with_adapter
        if linear in skipped:
            continue
        if _decodes(linear, m, how):
            yield _decoded(linear, m, linear.largest * linear.outputs if has_adapter else 0, how)
            continue
        if linear.format is not None:
            yield _dequantize(linear, how)
        if has_adapter:
            yield (
                _term(m, linear.outputs, linear.largest, ranks, how)
                if extends
                else gemm("adapters", m, linear.outputs, linear.largest, how)
            )
        yield gemm("products", m, linear.outputs, linear.inputs, how, accumulates=has_adapter and not extends)
        if how.dora and has_adapter:
            yield from _dora(linear, m, how, backward=False)


def _backward(group: Sequence[LayerLinear], m: int, how: KernelOptions) -> Iterator[KernelLaunch]:
    """Yield the launches for the gradients of the input, of adapters and of trained weights."""
    inputs, adapted = group[0].inputs, [linear for linear in group if linear.rank]
    ranks = sum(linear.largest for linear in adapted)
    separate = [linear.largest for linear in adapted if not _decodes(linear, m, how)]
    outs = {
        index: linear.outputs
        for index, linear in enumerate(group)
        if how.extends and linear.rank and linear.format is not None and not _decodes(linear, m, how)
    }
    carrier = extension.carrier(m, inputs, outs, ranks, how.itemsize)
    yield from _casts(adapted, how)
    yield from _other_trials(adapted, 2, how)
    for index, linear in enumerate(group):
        if linear.rank:
            yield gemm("adapters", m, linear.largest, linear.outputs, how)
            yield _parts(linear, m)
        if index == carrier:  # The copy of dY.
            yield KernelLaunch("adapters", how.itemsize * m * linear.outputs, launches=0)
        if _decodes(linear, m, how):
            yield _decoded(linear, m, linear.largest * inputs, how)
            if index > 0:
                yield KernelLaunch("products", 3 * how.itemsize * m * inputs)
        else:
            if linear.format is not None:
                yield _dequantize(linear, how)
            first = index == 0 if carrier is None else index == carrier
            accumulates = not first or (ranks > 0 and carrier is None)
            yield gemm("products", m, inputs, linear.outputs, how, accumulates=accumulates)
        if how.trains_base:
            yield gemm("products", linear.outputs, inputs, m, how)
            # Added to what earlier micro-batches left, in fp32.
            yield KernelLaunch("update", (how.itemsize + 2 * FP32) * linear.numel)
        if how.dora and linear.rank:
            yield from _dora(linear, m, how, backward=True)
    if ranks:
        if carrier is not None:
            yield _term(m, inputs, ranks, ranks, how)
        elif separate:
            yield gemm("adapters", m, inputs, sum(separate), how)
        yield gemm("adapters", ranks, inputs, m, how)


def skips(linear: LayerLinear, how: KernelOptions) -> bool:
    """Return whether recomputation leaves out a product, which nothing reads but DoRA's magnitude."""
    return linear.is_unread and not (how.dora and linear.rank > 0)


def _decodes(linear: LayerLinear, m: int, how: KernelOptions) -> bool:
    """Return whether the product of M rows decodes the weight itself."""
    return is_nf4(linear.format) and m <= how.few_rows


def _term(m: int, n: int, rank: int, side_by_side: int, how: KernelOptions) -> KernelLaunch:
    """Return an adapter's term as further columns of a base product: of `rank`, with others' `side_by_side`."""
    padding = extension.padded(side_by_side) - rank
    return KernelLaunch(
        "adapters", how.itemsize * (m + n) * rank, 2.0 * m * n * rank, launches=0, padding=2.0 * m * n * padding
    )


def _casts(adapted: Sequence[LayerLinear], how: KernelOptions) -> Iterator[KernelLaunch]:
    """Yield the casts of A, and of B times s, from fp32 masters. DoRA scales B in each pass."""
    for linear in adapted if how.dora or not how.copies else ():
        yield KernelLaunch("adapters", (FP32 + how.itemsize) * linear.largest * linear.inputs)
        yield KernelLaunch("adapters", (FP32 + how.itemsize) * linear.largest * linear.outputs)


def _other_trials(adapted: Sequence[LayerLinear], products: int, how: KernelOptions) -> Iterator[KernelLaunch]:
    """Yield the casts and reads of other trials' adapters for `products` products; their rows are among the M."""
    for linear in adapted if how.trials > 1 else ():
        nbytes = (linear.rank - linear.largest) * (linear.outputs + linear.inputs)
        nbytes *= FP32 + (1 + products) * how.itemsize
        yield KernelLaunch("adapters", nbytes, launches=2 * products * (how.trials - 1))


def _dequantize(linear: LayerLinear, how: KernelOptions) -> KernelLaunch:
    return KernelLaunch("dequantization", linear.packed_bytes + how.itemsize * linear.numel)


def _decoded(linear: LayerLinear, m: int, adapter: int, how: KernelOptions) -> KernelLaunch:
    """One product whose weight is decoded in it, with the adapter's term, of so many weights."""
    nbytes = linear.packed_bytes + how.itemsize * m * (linear.outputs + linear.inputs)
    return KernelLaunch("products", nbytes, 2.0 * m * (linear.numel + adapter), "decoding")


def _parts(linear: LayerLinear, m: int) -> KernelLaunch:
    """B's gradient, in the pass over dY: one fp32 part for 256 rows, written and read again."""
    nbytes = 2.0 * FP32 * -(-m // _PART_ROWS) * linear.outputs * linear.largest
    return KernelLaunch("adapters", nbytes, 2.0 * m * linear.largest * linear.outputs, launches=0)


def _dora(linear: LayerLinear, m: int, how: KernelOptions, *, backward: bool) -> Iterator[KernelLaunch]:
    """Norms, and magnitudes: folded into a weight in NF4, passes over y and dY for any other (kernels/README.md)."""
    out, features, rank = linear.outputs, linear.inputs, linear.largest
    if not backward:
        if is_nf4(linear.format):
            nbytes = linear.packed_bytes + how.itemsize * rank * (out + features)
            yield KernelLaunch("adapters", nbytes, 2.0 * rank * out * features, "decoding")
        else:
            yield gemm("adapters", out, rank, features, how)
        yield KernelLaunch("adapters", FP32 * rank * (features + out) + 2 * FP32 * out)
    if not is_nf4(linear.format):
        yield from [KernelLaunch("adapters", 2 * how.itemsize * m * out)] * (2 if backward else 1)
        return
    blocks = out * features / 64
    yield KernelLaunch("adapters", 5 * blocks)
    yield KernelLaunch("adapters", 2 * FP32 * rank * out)
    yield KernelLaunch("adapters", 3 * blocks, launches=0)
    if backward:
        yield KernelLaunch("adapters", how.itemsize * m * out + 2 * FP32 * -(-m // _PART_ROWS) * out, launches=0)
        yield KernelLaunch("adapters", 2 * FP32 * rank * out)


def _experts_forward(linear: LayerLinear, m: int, how: KernelOptions, which: Pass) -> Iterator[KernelLaunch]:
    """Yield the forward of a fused weight whose experts are one grouped product (experts_grouped.py)."""
    rows, e = linear.chosen * m, how.itemsize
    if linear.format is not None:
        yield _dequantize(linear, how)
    yield _grouped("products", linear, rows, linear.outputs, linear.inputs, how)
    if linear.rank and which != "base alone":
        yield KernelLaunch("adapters", (FP32 + e) * _adapter_numel(linear), launches=2)
        yield _grouped("adapters", linear, rows, linear.rank, linear.inputs, how)
        yield _grouped("adapters", linear, rows, linear.outputs, linear.rank, how)
        yield KernelLaunch("adapters", 3 * e * rows * linear.outputs)  # Added to the base's product.


def _experts_backward(linear: LayerLinear, m: int, how: KernelOptions) -> Iterator[KernelLaunch]:
    rows, e = linear.chosen * m, how.itemsize
    if linear.format is not None:
        yield _dequantize(linear, how)
    yield _grouped("products", linear, rows, linear.inputs, linear.outputs, how)
    if linear.rank:
        yield KernelLaunch("adapters", 2 * (FP32 + e) * _adapter_numel(linear), launches=4)
        yield _grouped("adapters", linear, rows, linear.rank, linear.outputs, how)
        for size in (linear.inputs, linear.outputs):  # Gradients of A and of B.
            nbytes = e * (rows * (size + linear.rank) + linear.local * linear.rank * size)
            yield KernelLaunch("adapters", nbytes, 2.0 * rows * linear.rank * size)
        yield _grouped("adapters", linear, rows, linear.inputs, linear.rank, how)
        yield KernelLaunch("adapters", 3 * e * rows * linear.inputs)


def _adapter_numel(linear: LayerLinear) -> int:
    return linear.local * linear.rank * (linear.outputs + linear.inputs)


def _grouped(kind: MovedKind, linear: LayerLinear, rows: int, n: int, k: int, how: KernelOptions) -> KernelLaunch:
    """Return a grouped product of (S, K) rows by the (K, N) matrices of all experts."""
    return KernelLaunch(kind, how.itemsize * (rows * k + linear.local * k * n + rows * n), 2.0 * rows * n * k)


@dataclass(frozen=True, slots=True, eq=False)
class BlockWork:
    """A micro-batch in a block. Blocks that are alike have the same object: none is compared with another."""

    forward: tuple[KernelLaunch, ...]
    recomputation: tuple[KernelLaunch, ...]
    backward: tuple[KernelLaunch, ...]
    reference: tuple[KernelLaunch, ...]
    """The rows once more without adapters (DPO)."""


def block_work(
    layer: PlannedLayer,
    how: KernelOptions,
    *,
    m: int,
    pairs: int,
    checkpointing: str,
    tiles: Sequence[int],
    reference: bool,
) -> BlockWork:
    """Return the work of one micro-batch in a decoder layer.

    `pairs`: query-key pairs that the layer computes for M tokens. `tiles`: tokens that the MLP runs at once, [M] if it
    runs whole.
    """

    def attention_half(which: Pass) -> tuple[KernelLaunch, ...]:
        return tuple(_attention_half(layer, how, m, pairs, which))

    def mlp_half(which: Pass) -> tuple[KernelLaunch, ...]:
        halves = (_mlp_half(layer, how, tile, which) for tile in tiles)
        return tuple(itertools.chain.from_iterable(halves))

    again = () if checkpointing == "none" else mlp_half("recomputation")
    if checkpointing in ("block", "offload"):
        again = attention_half("recomputation") + again
    if checkpointing == "offload":  # The input goes to the host and comes back.
        again += (KernelLaunch("elementwise", 2 * how.itemsize * m * layer.decoder.hidden, launches=0),)
    return BlockWork(
        attention_half("forward") + mlp_half("forward"),
        again,
        mlp_half("backward") + attention_half("backward"),
        attention_half("base alone") + mlp_half("base alone") if reference else (),
    )


def _attention_half(layer: PlannedLayer, how: KernelOptions, m: int, pairs: int, which: Pass) -> Iterator[KernelLaunch]:
    """Yield the launches of the attention half; in backward their order does not count."""
    decoder, backward = layer.decoder, which == "backward"
    queries, keys = decoder.queries, decoder.keys
    if decoder.halves[0] is not None:
        yield from _scaled_half(decoder.halves[0], layer, how, m, which)
        if decoder.attends:
            yield from attention(decoder, how, m, pairs, backward=backward)
        return
    yield norm(decoder.hidden * m, how, backward=backward)
    if decoder.head_norms:
        yield from (norm(columns * m, how, backward=backward) for columns in (queries, keys))
    yield rotary((queries + keys) * m, how, backward=backward)
    yield from attention(decoder, how, m, pairs, backward=backward)
    for name in ("qkv", "o"):
        yield from linears(layer.linears[name], m, how, which)
    yield from after(decoder, how, m, backward=backward)


def _mlp_half(layer: PlannedLayer, how: KernelOptions, m: int, which: Pass) -> Iterator[KernelLaunch]:
    """Yield the launches of the MLP half, dense or experts; in backward their order does not count."""
    decoder, backward = layer.decoder, which == "backward"
    e, hidden, experts = how.itemsize, decoder.hidden, decoder.experts
    if decoder.halves[1] is not None:
        yield from _scaled_half(decoder.halves[1], layer, how, m, which)
        return
    yield norm(hidden * m, how, backward=backward)
    if experts is not None:
        rows = experts.chosen * m
        # The router: its product, which no figure counts as operations, and a softmax over the experts.
        nbytes = e * (hidden * (m + experts.count)) + 4 * FP32 * experts.count * m
        yield KernelLaunch("elementwise", nbytes, launches=8)
        # Each token's states, once for each expert that it chooses (experts.dispatch).
        yield KernelLaunch("elementwise", 2 * e * rows * hidden, launches=2)
        if experts.degree > 1:  # Received rows are sorted, and their results put back.
            yield KernelLaunch("elementwise", 6 * e * rows * hidden, launches=12)
        # Experts' outputs times their weights, back in the tokens' order, and added up (experts.combine).
        yield KernelLaunch("elementwise", e * hidden * (5 * rows + m), launches=4)
    # Experts' own products of gate and up are the model's (distlora.model.experts).
    own = how if experts is None else replace(how, fused=how.fused - {"mlps"})
    yield gated(decoder.mlp_columns * m, own, backward=backward)
    for name in ("gate_up", "down"):
        yield from linears(layer.linears[name], m, how, which)
    if decoder.shared is not None:
        path, inner = decoder.shared
        yield gated(inner * m, how, backward=backward)
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield from linears(layer.linears[f"{path}.{name}"], m, how, which)
    yield from after(decoder, how, m, backward=backward)


def _scaled_half(
    half: ScaledHalf, layer: PlannedLayer, how: KernelOptions, m: int, which: Pass
) -> Iterator[KernelLaunch]:
    """Yield the launches of a half without formulas: its linears one by one, and passes over what it keeps."""
    yield KernelLaunch("elementwise", (4 if which == "backward" else 2) * half.keeps[0] * how.itemsize / 2 * m)
    for path in half.paths:
        yield from linears(layer.linears[path], m, how, which)


def after(decoder: Decoder, how: KernelOptions, m: int, *, backward: bool = False) -> Iterator[KernelLaunch]:
    """Yield the norm after a half, if there is one, and the residual sum; in backward the sum of two gradients."""
    if decoder.norms_after:
        yield norm(decoder.hidden * m, how, backward=backward)
    yield KernelLaunch("elementwise", 3 * how.itemsize * decoder.hidden * m)


def norm(numel: int, how: KernelOptions, *, backward: bool = False) -> KernelLaunch:
    """Return an RMSNorm.

    transformers' form casts to fp32, squares, averages, scales and casts back, and multiplies by the weight (in fp32
    for Gemma); backward takes 17 fp32 passes. A fused one reads x (and dy) and writes y (dx).
    """
    e = how.itemsize
    if "norms" in how.fused:
        return KernelLaunch("elementwise", (3 if backward else 2) * e * numel)
    casts = 0 if e == FP32 else 2 * (e + FP32)
    own = (17 if backward else 5) * FP32 + casts + 2 * (FP32 if how.norms_in_fp32 else e)
    return KernelLaunch("elementwise", own * numel, launches=14 if backward else 8)


def gated(numel: int, how: KernelOptions, *, backward: bool = False) -> KernelLaunch:
    """act(gate) * up of so many inner elements."""
    if "mlps" in how.fused:
        return KernelLaunch("elementwise", (5 if backward else 3) * how.itemsize * numel)
    return KernelLaunch("elementwise", (9 if backward else 5) * how.itemsize * numel, launches=3 if backward else 2)


def rotary(numel: int, how: KernelOptions, *, backward: bool = False) -> KernelLaunch:
    """Return the rotary embedding: two products with tables, a rotation, a sum; fused: one launch in place."""
    if "rotary" in how.fused:
        return KernelLaunch("elementwise", 2 * how.itemsize * numel)
    return KernelLaunch("elementwise", (14 if backward else 10) * how.itemsize * numel, launches=14 if backward else 10)


def attention(decoder: Decoder, how: KernelOptions, m: int, pairs: int, *, backward: bool) -> Iterator[KernelLaunch]:
    """Yield the launches of attention.

    Flash attention reads queries, keys and values, writes the output and a number per head, and recomputes scores in
    backward. Eager attention passes over the scores in the run's dtype and in fp32; tiles have scores in the run's
    dtype.
    """
    e, columns, kind = how.itemsize, decoder.queries, how.attention
    nbytes = (4 if backward else 2) * e * (decoder.queries + decoder.keys) * m + FP32 * decoder.heads * m
    flops = (PAIR_BACKWARD if backward else PAIR_FORWARD) * columns * pairs
    if kind == "tiles":  # Forward makes them twice, backward once.
        again = SCORES_AGAIN * columns * pairs
        yield KernelLaunch("attention", nbytes, flops + again, launches=5 if backward else 3)
        # Forward: written twice, read for the largest, their powers, the sum, the output. Backward: weights and their
        # gradients, two products of each but the one, the softmax's.
        yield KernelLaunch("attention", (9 if backward else 7) * e * decoder.heads * pairs, launches=4)
        return
    if kind != "eager":
        again = SCORES_AGAIN * columns * pairs if backward else 0
        yield KernelLaunch("attention", nbytes, flops + again, "attention", launches=3 if backward else 1)
        return
    yield KernelLaunch("attention", nbytes, flops, launches=4 if backward else 2)
    # Forward: scores, scale, mask, softmax in fp32, back, read again. Backward: the gradients of all of them.
    passes = 8 * e + (5 if backward else 2) * FP32
    yield KernelLaunch("attention", passes * decoder.heads * pairs, launches=5)


def head_work(
    vocabulary: int,
    hidden: int,
    how: KernelOptions,
    *,
    m: int,
    trained: bool,
    trained_rows: int,
    form: str,
    reference: bool,
    distills: bool = False,
    stored: int = 0,
    backward: bool = True,
) -> Iterator[KernelLaunch]:
    """Yield the embedding, the last norm, and the LM head chunk by chunk (lm_head.py); `backward`: with gradients.

    `trained_rows`: rows that are trained while the rest is frozen. `form`: of the head (HeadForm). `stored`: bytes of a
    head in low bits, which is dequantized for each product. `distills`: the loss compares two distributions.

    A frozen head computes the gradient of its input in forward; a trained one recomputes its logits in backward. The
    weight is read for each chunk and product. A vocabulary of 0: there is none, but a score of `trained_rows` outputs.
    """
    e = how.itemsize
    yield KernelLaunch("head", 2 * e * hidden * m)
    for back in (False, True)[: 1 + backward]:
        yield norm(hidden * m, how, backward=back)
    casts = 0 if e == FP32 else e + FP32
    plain, compiled = form == "plain" and not (trained or trained_rows), "loss" in how.fused
    cap = (24, 28) if form == "softcap" else (0, 0)
    of_loss, of_gradient, launches = casts + 3 * FP32 + cap[0], casts + 5 * FP32 + cap[1], (4, 4)
    if plain and compiled:  # Read twice, and overwritten.
        of_loss, of_gradient, launches = 3 * e, 0, (1, 0)
    elif plain:  # The labels' places in zeros, and the gradient.
        of_gradient, launches = casts + 6 * FP32, (3, 4 * GRADIENT_PARTS)
    if distills:  # Of both passes together; three softmaxes, their difference, its expectation and the gradient.
        of_loss, of_gradient, launches = casts + cap[0], casts + 18 * FP32 + cap[1], (2, 12 * GRADIENT_PARTS)
    at_peak = logit_bytes(e, plain=plain, compiled=compiled, capped=form == "softcap", distills=distills)
    size = tokens_per_chunk(vocabulary, at_peak, on_cpu=not how.is_gpu) if vocabulary else 0
    for tokens, times in chunks(m, size) if vocabulary else ():
        logits = vocabulary * tokens
        moved, flops = e * (hidden * (tokens + vocabulary) + logits), 2.0 * logits * hidden
        if stored:
            products = times * (1 + reference + backward)
            yield KernelLaunch("dequantization", products * (stored + e * hidden * vocabulary), launches=products)
        losses = (2 if trained else 1) + reference  # A trained head makes its logits again, for the gradient.
        for passes, number in [(of_loss, launches[0])] * losses + [(of_gradient, launches[1])] * backward:
            yield KernelLaunch("head", times * moved, times * flops, launches=times)
            yield KernelLaunch("head", times * passes * logits, launches=number * times)
        if trained:
            moved += 3 * FP32 * hidden * vocabulary
            yield KernelLaunch("head", times * moved, times * flops, launches=2 * times)
    if trained_rows:
        yield KernelLaunch(
            "head", 3 * (e * hidden * (m + trained_rows) + 2 * FP32 * trained_rows * m), 6.0 * m * trained_rows * hidden
        )
    if backward:
        yield KernelLaunch("head", (2 * FP32 if e == FP32 else 2 * (e + FP32)) * hidden * m, launches=2)


def chunks(m: int, size: int) -> Iterable[tuple[int, int]]:
    """Return (tokens of a chunk, number of such chunks) for chunks of up to `size` tokens."""
    whole, rest = divmod(m, size)
    return [(tokens, times) for tokens, times in ((size, whole), (rest, 1)) if tokens and times]


def update_work(numel: int, optimizer: str, *, clips: bool, backwards: int, trials: int = 1) -> Iterator[KernelLaunch]:
    """Yield the update, trial by trial: gradients zeroed, added up, their norm, scaling, the optimizer."""
    yield KernelLaunch("update", FP32 * numel * (1 + 3 * backwards) + FP32 * numel, launches=2 * trials)
    if clips:
        yield KernelLaunch("update", 2 * FP32 * numel, launches=trials)
    yield KernelLaunch("update", UPDATE_BYTES[optimizer] * numel, launches=trials)
