"""List the kernel launches of a decoder layer, the LM head and the optimizer (work.py). Imports no torch.

Bytes of what is no product are counted from the operations that the code calls, each reading its inputs and writing its
result once, in transformers' form (a norm is eight operations in fp32) and in liger-kernel's (one). tests/
test_plan_work.py counts them on the CPU as they run.

Letters: as in work.py; V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from distlora.planner.memory.activations import tokens_at_once
from distlora.planner.memory.trained import UPDATE_BYTES
from distlora.planner.speed.compute import SCORES_AGAIN
from distlora.planner.speed.operations import PAIR_BACKWARD, PAIR_FORWARD
from distlora.planner.speed.work import FP32, How, Linear, Work, backward, forward


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSizes:
    """A decoder block, as far as its launches depend on it."""

    hidden: int
    queries: int
    keys: int
    heads: int
    attention: tuple[tuple[Linear, ...], ...]
    """Groups that share an input: q, k, v (or qkv); o."""
    mlp: tuple[tuple[Linear, ...], ...]
    """gate, up (or gate_up); down."""
    norms_after: bool
    """Whether a norm follows attention and another the MLP."""
    head_norms: bool
    gemma: bool
    """Whether a norm multiplies by its weight in fp32."""
    experts: int
    """0: none."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockWork:
    """A micro-batch in a block. Blocks that are alike have the same object: none is compared with another."""

    forward: tuple[Work, ...]
    backward: tuple[Work, ...]
    """With what is recomputed before it."""
    reference: tuple[Work, ...]
    """The rows once more without adapters (DPO)."""


def block_work(
    sizes: BlockSizes, how: How, *, m: int, pairs: int, checkpointing: str, tiles: Sequence[int], reference: bool
) -> BlockWork:
    """Return the work of one micro-batch in a decoder layer.

    `pairs`: query-key pairs that the layer computes for M tokens. `tiles`: tokens that the MLP runs at once, [M] if it
    runs whole.
    """
    of_attention = tuple(attention_forward(sizes, how, m, pairs))
    of_mlp = tuple(work for tile in tiles for work in mlp_forward(sizes, how, tile))
    again: tuple[Work, ...] = ()
    if checkpointing in ("block", "offload"):
        again = of_attention + of_mlp
    elif checkpointing == "selective":
        again = of_mlp
    if checkpointing == "offload":  # The input goes to the host and comes back.
        again += (Work("elementwise", 2 * how.itemsize * m * sizes.hidden, launches=0),)
    gradients = tuple(work for tile in tiles for work in mlp_backward(sizes, how, tile))
    gradients += tuple(attention_backward(sizes, how, m, pairs))
    base: tuple[Work, ...] = ()
    if reference:
        base = tuple(attention_forward(sizes, how, m, pairs, adapted=False))
        base += tuple(work for tile in tiles for work in mlp_forward(sizes, how, tile, adapted=False))
    return BlockWork(of_attention + of_mlp, again + gradients, base)


def attention_forward(sizes: BlockSizes, how: How, m: int, pairs: int, *, adapted: bool = True) -> Iterator[Work]:
    """Yield the launches of the attention half's forward."""
    projections, output = sizes.attention
    yield norm(sizes.hidden * m, how, sizes.gemma)
    yield from forward(projections, m, how, adapted=adapted)
    if sizes.head_norms:
        yield from (norm(columns * m, how, sizes.gemma) for columns in (sizes.queries, sizes.keys))
    yield rotary((sizes.queries + sizes.keys) * m, how)
    yield from attention(sizes, how, m, pairs, backward=False)
    yield from forward(output, m, how, adapted=adapted)
    yield from after(sizes, how, m)


def attention_backward(sizes: BlockSizes, how: How, m: int, pairs: int) -> Iterator[Work]:
    """Yield the launches of the attention half's backward."""
    projections, output = sizes.attention
    yield from after(sizes, how, m, backward=True)
    yield from backward(output, m, how)
    yield from attention(sizes, how, m, pairs, backward=True)
    yield rotary((sizes.queries + sizes.keys) * m, how, backward=True)
    if sizes.head_norms:
        yield from (norm(columns * m, how, sizes.gemma, backward=True) for columns in (sizes.queries, sizes.keys))
    yield from backward(projections, m, how)
    yield norm(sizes.hidden * m, how, sizes.gemma, backward=True)


def mlp_forward(sizes: BlockSizes, how: How, m: int, *, adapted: bool = True) -> Iterator[Work]:
    """Yield the launches of the MLP half's forward."""
    inputs, down = sizes.mlp
    yield norm(sizes.hidden * m, how, sizes.gemma)
    if sizes.experts:
        yield _router(sizes, how, m)
        yield _sorted_rows(sizes, how, m)
    yield from forward(inputs, m, how, adapted=adapted)
    yield gated(down[0].chosen * down[0].features * m, how)
    yield from forward(down, m, how, adapted=adapted)
    if sizes.experts:
        yield _weighted_rows(sizes, how, m)
    yield from after(sizes, how, m)


def mlp_backward(sizes: BlockSizes, how: How, m: int) -> Iterator[Work]:
    """Yield the launches of the MLP half's backward."""
    inputs, down = sizes.mlp
    yield from after(sizes, how, m, backward=True)
    if sizes.experts:
        yield _weighted_rows(sizes, how, m)
    yield from backward(down, m, how)
    yield gated(down[0].chosen * down[0].features * m, how, backward=True)
    yield from backward(inputs, m, how)
    if sizes.experts:
        yield _sorted_rows(sizes, how, m)
        yield _router(sizes, how, m)
    yield norm(sizes.hidden * m, how, sizes.gemma, backward=True)


def after(sizes: BlockSizes, how: How, m: int, *, backward: bool = False) -> Iterator[Work]:
    """Yield the norm after a half, if there is one, and the residual sum; in backward the sum of two gradients."""
    if sizes.norms_after:
        yield norm(sizes.hidden * m, how, sizes.gemma, backward=backward)
    yield Work("elementwise", 3 * how.itemsize * sizes.hidden * m)


def norm(numel: int, how: How, gemma: bool, *, backward: bool = False) -> Work:
    """Return an RMSNorm.

    transformers' form casts to fp32, squares, averages, scales and casts back, and multiplies by the weight (in fp32
    for Gemma); backward takes 17 fp32 passes. liger-kernel reads x (and dy) and writes y (dx).
    """
    e = how.itemsize
    if how.fused_norms:
        return Work("elementwise", (3 if backward else 2) * e * numel)
    casts = 0 if e == FP32 else 2 * (e + FP32)
    own = (17 if backward else 5) * FP32 + casts + 2 * (FP32 if gemma else e)
    return Work("elementwise", own * numel, launches=14 if backward else 8)


def gated(numel: int, how: How, *, backward: bool = False) -> Work:
    """act(gate) * up of so many inner elements."""
    if how.fused:
        return Work("elementwise", (5 if backward else 3) * how.itemsize * numel)
    return Work("elementwise", (9 if backward else 5) * how.itemsize * numel, launches=3 if backward else 2)


def rotary(numel: int, how: How, *, backward: bool = False) -> Work:
    """Return the rotary embedding of queries and keys: two products with the tables, a rotation and a sum.

    liger-kernel works in place, in one launch.
    """
    if how.fused:
        return Work("elementwise", 2 * how.itemsize * numel)
    return Work("elementwise", (14 if backward else 10) * how.itemsize * numel, launches=14 if backward else 10)


def attention(sizes: BlockSizes, how: How, m: int, pairs: int, *, backward: bool) -> Iterator[Work]:
    """Yield the launches of attention.

    Flash attention reads queries, keys and values, writes the output and a number per head, and recomputes scores in
    backward. Eager attention passes over the scores in the run's dtype and in fp32; tiles have scores in the run's
    dtype.
    """
    e, columns, kind = how.itemsize, sizes.queries, how.attention
    nbytes = (4 if backward else 2) * e * (sizes.queries + sizes.keys) * m + FP32 * sizes.heads * m
    flops = (PAIR_BACKWARD if backward else PAIR_FORWARD) * columns * pairs
    if kind == "tiles":  # Forward makes them twice, backward once.
        again = SCORES_AGAIN * columns * pairs
        yield Work("attention", nbytes, flops + again, launches=5 if backward else 3)
        # Forward: written twice, read for the largest, their powers, the sum, the output. Backward: weights and their
        # gradients, two products of each but the one, the softmax's.
        yield Work("attention", (9 if backward else 7) * e * sizes.heads * pairs, launches=4)
        return
    if kind != "eager":
        again = SCORES_AGAIN * columns * pairs if backward else 0
        yield Work("attention", nbytes, flops + again, "attention", launches=3 if backward else 1)
        return
    yield Work("attention", nbytes, flops, launches=4 if backward else 2)
    # Forward: scores, scale, mask, softmax in fp32, back, read again. Backward: the gradients of all of them.
    passes = 8 * e + (5 if backward else 2) * FP32
    yield Work("attention", passes * sizes.heads * pairs, launches=5)


def _router(sizes: BlockSizes, how: How, m: int) -> Work:
    """Its product, which no figure counts as operations, and a softmax over the experts."""
    e = how.itemsize
    return Work("elementwise", e * (sizes.hidden * (m + sizes.experts)) + 4 * FP32 * sizes.experts * m, launches=8)


def _sorted_rows(sizes: BlockSizes, how: How, m: int) -> Work:
    """Each token's states, once for each expert that it chooses (experts.dispatch)."""
    return Work("elementwise", 2 * how.itemsize * sizes.mlp[0][0].chosen * sizes.hidden * m, launches=2)


def _weighted_rows(sizes: BlockSizes, how: How, m: int) -> Work:
    """Experts' outputs times their weights, back in the tokens' order, and added up (experts.combine)."""
    rows = sizes.mlp[0][0].chosen * m
    return Work("elementwise", how.itemsize * sizes.hidden * (5 * rows + m), launches=4)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSizes:
    """Sizes of embedding and LM head."""

    vocabulary: int
    hidden: int
    rows: int
    """That are trained while the rest is frozen."""
    is_trained: bool
    capped: bool
    """Whether logits are capped (Gemma 2)."""
    gemma: bool


def head_work(sizes: HeadSizes, how: How, *, m: int, reference: bool) -> Iterator[Work]:
    """Yield the embedding, the last norm, and the LM head chunk by chunk (head.py).

    A frozen head computes the gradient of its input in forward; a trained one recomputes its logits in backward. The
    weight is read for each chunk and product.
    """
    e, hidden, vocabulary = how.itemsize, sizes.hidden, sizes.vocabulary
    yield Work("head", 2 * e * hidden * m)
    for back in (False, True):
        yield norm(hidden * m, how, sizes.gemma, backward=back)
    casts = 0 if e == FP32 else e + FP32
    cap = 24 if sizes.capped else 0
    of_loss, of_gradient = casts + 3 * FP32 + cap, casts + 5 * FP32 + (28 if sizes.capped else 0)
    for tokens, times in chunks(m, tokens_at_once(vocabulary, is_gpu=how.is_gpu)):
        logits = vocabulary * tokens
        product = (e * (hidden * (tokens + vocabulary) + logits), 2.0 * logits * hidden)
        weight = (e * (hidden * (tokens + vocabulary) + logits) + 3 * FP32 * hidden * vocabulary, product[1])
        passes = (2, 1) if sizes.is_trained else (1, 1)
        for _ in range(passes[0]):
            yield Work("head", times * product[0], times * product[1], launches=times)
            yield Work("head", times * of_loss * logits, launches=4 * times)
        yield Work("head", times * product[0], times * product[1], launches=times)
        yield Work("head", times * of_gradient * logits, launches=4 * times)
        if sizes.is_trained:
            yield Work("head", times * weight[0], times * weight[1], launches=2 * times)
        if reference:
            yield Work("head", times * product[0], times * product[1], launches=times)
            yield Work("head", times * of_loss * logits, launches=4 * times)
    if sizes.rows:
        yield Work(
            "head", 3 * (e * hidden * (m + sizes.rows) + 2 * FP32 * sizes.rows * m), 6.0 * m * sizes.rows * hidden
        )
    yield Work("head", (2 * FP32 if e == FP32 else 2 * (e + FP32)) * hidden * m, launches=2)


def chunks(m: int, size: int) -> Iterable[tuple[int, int]]:
    """Return (tokens of a chunk, number of such chunks) for chunks of up to `size` tokens."""
    whole, rest = divmod(m, size)
    return [(tokens, times) for tokens, times in ((size, whole), (rest, 1)) if tokens and times]


def update_work(numel: int, optimizer: str, *, clips: bool, backwards: int, trials: int = 1) -> Iterator[Work]:
    """Yield the update of a rank's trained parameters, trial by trial.

    Gradients are zeroed and added up in each backward, their norm is taken, they are scaled, and the optimizer runs.
    """
    yield Work("update", FP32 * numel * (1 + 3 * backwards) + FP32 * numel, launches=2 * trials)
    if clips:
        yield Work("update", 2 * FP32 * numel, launches=trials)
    yield Work("update", UPDATE_BYTES[optimizer] * numel, launches=trials)
