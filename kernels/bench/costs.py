"""The launches of every candidate, with their bytes and flops: what a prediction is made of (rates.py).

Letters: M rows, I in features, O out features, R rank; E bytes of a bf16 element; P bytes of a packed weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from distlora_kernels.nf4 import bits_per_weight

from .rates import Step
from .shapes import Group

E = 2
FUSED_EFFICIENCY = 0.5
"""Of the GEMM rate, in the tile loop that also decodes: an estimate (0.4 to 0.6)."""


def packed_bytes(out: int, features: int) -> float:
    return out * features * bits_per_weight(out * features) / 8


def gemm_flops(group: Group, num_rows: int, *, backward: bool) -> float:
    """Of the plain GEMMs: forward, and with `backward` that of dX."""
    return sum(2.0 * num_rows * out * features for out, features in group.shapes) * (2 if backward else 1)


def floor_bytes(group: Group, num_rows: int, *, packed: bool, backward: bool) -> float:
    """What must be moved at least: the weights as they are stored, x and y; with `backward` again, as dx and dy."""
    weights = sum(packed_bytes(*shape) if packed else E * shape[0] * shape[1] for shape in group.shapes)
    rows = E * num_rows * (group.features + sum(out for out, _ in group.shapes))
    return (weights + rows) * (2 if backward else 1)


def dequantize(out: int, features: int) -> Step:
    return Step(packed_bytes(out, features) + E * out * features)


def _gemm(m: int, n: int, k: int, *, accumulates: bool = False, size: int = E) -> Step:
    """(M, K) by (K, N): both are read, the product is written; read before, if it is accumulated into."""
    return Step(size * (m * k + k * n + m * n * (2 if accumulates else 1)), 2.0 * m * n * k)


def plain(group: Group, m: int, *, backward: bool) -> Iterator[Step]:
    for out, features in group.shapes:
        yield _gemm(m, out, features)
        if backward:
            yield _gemm(m, features, out)


def bitsandbytes(group: Group, m: int, *, backward: bool) -> Iterator[Step]:
    """Three launches and 2.8 bytes a weight before each GEMM: what 0.50 does from M = 1537 on."""
    yield from plain(group, m, backward=backward)
    for out, features in group.shapes * (2 if backward else 1):
        yield Step(2.8 * out * features)
        yield from (Step(0.0), Step(0.0))


def ours_scratch(group: Group, m: int, r: int, *, backward: bool, kept: bool = False) -> Iterator[Step]:
    """x A^T once for the group, the adapter's term, one dequantization, a GEMM that accumulates; dy read once beside
    the GEMM of dX, x once for all dA. `kept`: backward finds the weights dequantized.
    """
    yield from _our_casts(group, r, backward=backward)
    yield _gemm(m, r * len(group.shapes), group.features)
    for out, features in group.shapes:
        yield from (dequantize(out, features), _gemm(m, out, r), _gemm(m, out, features, accumulates=True))
    if not backward:
        return
    for out, features in group.shapes:
        yield from (_gemm(m, r, out), _parts(out, m, r))
        if not kept:
            yield dequantize(out, features)
        yield _gemm(m, features, out, accumulates=True)
    yield _gemm(m, group.features, r * len(group.shapes))
    yield from (_gemm(r * len(group.shapes), group.features, m), Step(0.0))


def ours_packed(group: Group, m: int, r: int, trials: int, *, backward: bool) -> Iterator[Step]:
    """ours_scratch of `trials` times m rows, each with the adapter of its trial, all of one rank: the products of a row
    are of its own rank alone. What is more than of one trial with as many rows: adapters are stacked, in fp32 and for
    the group's A again in bf16, and those of all trials are cast.
    """
    yield from ours_scratch(group, trials * m, r, backward=backward)
    for step in _our_casts(group, r * (trials - 1), backward=backward):
        yield _beside(step.nbytes)
    for out, features in group.shapes:
        yield from (Step(8 * r * trials * features), Step(8 * r * trials * out))
    if len(group.shapes) > 1:
        yield from [Step(2 * E * r * trials * len(group.shapes) * group.features)] * (2 if backward else 1)


def ours_dora(group: Group, m: int, r: int, *, backward: bool) -> Iterator[Step]:
    """ours_scratch with magnitudes that are folded into packed weights (dora_linear.py): W A^T of the packed weight,
    norms, k into the absmax and B, and y read beside dy; the absmax are then read in fp32.
    """
    yield from ours_scratch(group, m, r, backward=backward)
    for out, features in group.shapes:
        blocks = out * features / 64
        yield Step(packed_bytes(out, features) + E * r * (out + features), 2.0 * r * out * features, FUSED_EFFICIENCY)
        yield Step(4 * r * (features + out) + 8 * out)  # A A^T, then the norms
        for _ in range(2 if backward else 1):
            yield Step((1 + 4) * blocks)
            yield Step(8 * r * out)  # k B
            yield _beside(3 * blocks)
        if backward:
            yield _beside(E * m * out + 8 * math.ceil(m / 256) * out)
            yield Step(8 * r * out)  # dB times k


def _beside(nbytes: float) -> Step:
    """More bytes for a launch that is counted already."""
    return Step(nbytes, launches=0)


def ours_dora_dense(group: Group, m: int, r: int, *, backward: bool) -> Iterator[Step]:
    """The same where the weights are dense: y is scaled in place, dy into another tensor, and both read again for dm;
    nothing is dequantized.
    """
    yield from ours_dense(group, m, r, backward=backward)
    for out, features in group.shapes:
        yield _gemm(out, r, features)
        yield Step(4 * r * (features + out) + 8 * out)
        yield from [Step(2 * E * m * out)] * (3 if backward else 1)


def ours_dense(group: Group, m: int, r: int, *, backward: bool) -> Iterator[Step]:
    """ours_scratch of dense weights."""
    dequantized = [dequantize(*shape) for shape in group.shapes]
    yield from (step for step in ours_scratch(group, m, r, backward=backward) if step not in dequantized)


def _parts(out: int, m: int, r: int) -> Step:
    """db's parts, one fp32 (out, R) for 256 rows, written by the pass over dy and read again."""
    return Step(2 * 4.0 * math.ceil(m / 256) * out * r)


def _casts(group: Group, r: int, *, backward: bool) -> Iterator[Step]:
    """A and B from fp32 masters to bf16, in forward; in backward again, or their gradients to fp32."""
    for out, features in group.shapes * (2 if backward else 1):
        yield from (Step((4 + E) * r * features), Step((4 + E) * r * out))


def _our_casts(group: Group, r: int, *, backward: bool) -> Iterator[Step]:
    """Beside the casts, s is multiplied into B."""
    yield from _casts(group, r, backward=backward)
    yield from (Step(8 * r * out) for out, _ in group.shapes * (2 if backward else 1))


def fused(out: int, features: int, m: int) -> Step:
    """One product whose weight is decoded in it."""
    return Step(packed_bytes(out, features) + E * m * (out + features), 2.0 * m * out * features, FUSED_EFFICIENCY)


def ours_fused(group: Group, m: int, r: int, *, backward: bool) -> Iterator[Step]:
    """The same with the decoding GEMM, which adds the adapter's terms itself; the linears' parts of dX are added up."""
    yield from _our_casts(group, r, backward=backward)
    yield _gemm(m, r * len(group.shapes), group.features)
    for index, (out, features) in enumerate(group.shapes):
        yield fused(out, features, m)
        if backward:
            yield from (_gemm(m, r, out), _parts(out, m, r), fused(out, features, m))
            yield from [Step(3 * E * m * features)] * (index > 0)
    if backward:
        yield from (_gemm(r * len(group.shapes), group.features, m), Step(0.0))


def peft(group: Group, m: int, r: int, *, backward: bool, autocast: bool) -> Iterator[Step]:
    """Passes over (M, O) and (M, I) one by one; the adapter's products in fp32 without autocast."""
    size, cast = (E, 0) if autocast else (4, 1)
    if autocast:
        yield from _casts(group, r, backward=backward)
    for index, (out, features) in enumerate(group.shapes):
        narrow, wide, x, x_wide = E * m * out, size * m * out, E * m * features, size * m * features
        yield from (dequantize(out, features), _gemm(m, out, features))
        yield Step(2 * narrow)  # clone
        yield from [Step(x + x_wide)] * cast
        yield from (_gemm(m, r, features, size=size), _gemm(m, out, r, size=size))
        yield Step(2 * wide)  # scale
        yield from [Step(wide + narrow)] * cast
        yield Step(3 * narrow)  # result + output
        if backward:
            yield from [Step(wide + narrow)] * cast
            yield Step(2 * wide)
            yield from (_gemm(out, r, m, size=size), _gemm(m, r, out, size=size))
            yield from (_gemm(r, features, m, size=size), _gemm(m, features, r, size=size))
            yield from [Step(x + x_wide)] * cast
            yield from (dequantize(out, features), _gemm(m, features, out))
            yield from [Step(3 * x)] * (1 if index == 0 else 2)  # dX of base and adapter, and of the linear before


def unsloth(group: Group, m: int, r: int, *, backward: bool) -> Iterator[Step]:
    yield from _casts(group, r, backward=backward)
    for out, features in group.shapes:
        yield from (dequantize(out, features), _gemm(m, out, features), _gemm(m, r, features))
        yield _gemm(m, out, r, accumulates=True)
    if not backward:
        return
    for index, (out, features) in enumerate(group.shapes):
        yield from (_gemm(m, r, out), _gemm(features, r, m), _gemm(r, m, features), _gemm(r, out, m))
        yield from (dequantize(out, features), _gemm(m, features, out, accumulates=index > 0), _gemm(m, r, out))
        yield _gemm(m, features, r, accumulates=True)
