"""Count the launches of every candidate, with their bytes and flops, and predict their time.

A prediction is the sum over the launches of max(bytes / copy bandwidth, flops / GEMM rate) and a fixed cost per launch:
it assumes that each operation reads its inputs and writes its output once, and that operations do not overlap.

Letters: M rows, I in features, O out features, R rank; E bytes of a bf16 element; P bytes of a quantized weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from distlora_kernels.nf4 import bits_per_weight

from .problem import Group

LAUNCH_SECONDS = 3e-6
"""Seconds from the end of one kernel to the start of the next, ramps included: an estimate, not measured."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second of a large copy and flops per second of a large bf16 GEMM."""

    bandwidth: float
    gemm: float


ASSUMED = Rates(bandwidth=3.0e12, gemm=800e12)
"""Rates of an H100, for predictions without a measurement."""


@dataclass(frozen=True, slots=True)
class Step:
    """One launch: bytes moved to and from GPU memory, and bf16 flops."""

    nbytes: float
    flops: float = 0.0
    efficiency: float = 1.0
    """Expected fraction of the GEMM rate."""
    launches: int = 1
    """Number of launches; 0 for additional bytes of another launch."""

    def seconds(self, rates: Rates) -> float:
        """Return the predicted seconds."""
        return self.launches * LAUNCH_SECONDS + max(
            self.nbytes / rates.bandwidth, self.flops / (rates.gemm * self.efficiency)
        )


def predicted_seconds(steps: Iterable[Step], rates: Rates) -> float:
    """Return the predicted seconds of a sequence of launches."""
    return sum(step.seconds(rates) for step in steps)


E = 2
FUSED_EFFICIENCY = 0.5
"""Fraction of the GEMM rate of the tile loop that also decodes: an estimate (0.4 to 0.6)."""


def quantized_bytes(out: int, features: int) -> float:
    """Return the stored bytes of a quantized weight."""
    return out * features * bits_per_weight(out * features) / 8


def gemm_flops(group: Group, num_rows: int, *, backward: bool) -> float:
    """Return the flops of the plain GEMMs: forward, and with `backward` also dX."""
    return sum(2.0 * num_rows * out * features for out, features in group.shapes) * (2 if backward else 1)


def floor_bytes(group: Group, num_rows: int, *, quantized: bool, backward: bool) -> float:
    """Return the fewest bytes to move: stored weights, x and y; with `backward` again, with dx and dy."""
    weights = sum(quantized_bytes(*shape) if quantized else E * shape[0] * shape[1] for shape in group.shapes)
    rows = E * num_rows * (group.features + sum(out for out, _ in group.shapes))
    return (weights + rows) * (2 if backward else 1)


def dequantize(out: int, features: int) -> Step:
    """Count a dequantization to bf16."""
    return Step(quantized_bytes(out, features) + E * out * features)


def _gemm(m: int, n: int, k: int, *, accumulates: bool = False, size: int = E) -> Step:
    """Count an (M, K) by (K, N) product: operands are read, the result written, and read too if accumulated into."""
    return Step(size * (m * k + k * n + m * n * (2 if accumulates else 1)), 2.0 * m * n * k)


def plain(group: Group, m: int, *, backward: bool) -> Iterator[Step]:
    """Count the bf16 GEMMs alone."""
    for out, features in group.shapes:
        yield _gemm(m, out, features)
        if backward:
            yield _gemm(m, features, out)


def bitsandbytes(group: Group, m: int, *, backward: bool) -> Iterator[Step]:
    """Count three launches and 2.8 bytes per weight before each GEMM, as bitsandbytes 0.50 does from M = 1537 on."""
    yield from plain(group, m, backward=backward)
    for out, features in group.shapes * (2 if backward else 1):
        yield Step(2.8 * out * features)
        yield from (Step(0.0), Step(0.0))


def ours_scratch(group: Group, m: int, r: int, *, backward: bool, kept: bool = False) -> Iterator[Step]:
    """Count ours with dequantized weights.

    x A^T once per group, the adapter's term, one dequantization, a GEMM that accumulates; dy is read once beside the
    GEMM of dX, x once for all dA. With `kept`, backward finds the weights dequantized.
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


def ours_multi_trial(group: Group, m: int, r: int, trials: int, *, backward: bool) -> Iterator[Step]:
    """Count ours_scratch of `trials` times m rows, each row with its trial's adapter, all of one rank.

    Beyond one trial with as many rows, adapters are stacked, in fp32 and for the group's A again in bf16, and those of
    all trials are cast.
    """
    yield from ours_scratch(group, trials * m, r, backward=backward)
    for step in _our_casts(group, r * (trials - 1), backward=backward):
        yield _beside(step.nbytes)
    for out, features in group.shapes:
        yield from (Step(8 * r * trials * features), Step(8 * r * trials * out))
    if len(group.shapes) > 1:
        yield from [Step(2 * E * r * trials * len(group.shapes) * group.features)] * (2 if backward else 1)


def ours_dora(group: Group, m: int, r: int, *, backward: bool) -> Iterator[Step]:
    """Count ours_scratch with magnitudes folded into quantized weights (dora_linear.py).

    W A^T of the quantized weight, norms, k into the absmax and B, and y read beside dy; absmax are then read in fp32.
    """
    yield from ours_scratch(group, m, r, backward=backward)
    for out, features in group.shapes:
        blocks = out * features / 64
        yield Step(
            quantized_bytes(out, features) + E * r * (out + features), 2.0 * r * out * features, FUSED_EFFICIENCY
        )
        yield Step(4 * r * (features + out) + 8 * out)  # A A^T, then the norms
        for _ in range(2 if backward else 1):
            yield Step((1 + 4) * blocks)
            yield Step(8 * r * out)  # k B
            yield _beside(3 * blocks)
        if backward:
            yield _beside(E * m * out + 8 * math.ceil(m / 256) * out)
            yield Step(8 * r * out)  # dB times k


def _beside(nbytes: float) -> Step:
    """Count more bytes of a launch that is already counted."""
    return Step(nbytes, launches=0)


def ours_dora_dense(group: Group, m: int, r: int, *, backward: bool) -> Iterator[Step]:
    """Count DoRA over dense weights: y is scaled in place, dy into another tensor, and both are read again for dm."""
    yield from ours_dense(group, m, r, backward=backward)
    for out, features in group.shapes:
        yield _gemm(out, r, features)
        yield Step(4 * r * (features + out) + 8 * out)
        yield from [Step(2 * E * m * out)] * (3 if backward else 1)


def ours_dense(group: Group, m: int, r: int, *, backward: bool) -> Iterator[Step]:
    """Count ours over dense weights: ours_scratch without dequantization."""
    dequantized = [dequantize(*shape) for shape in group.shapes]
    yield from (step for step in ours_scratch(group, m, r, backward=backward) if step not in dequantized)


def _parts(out: int, m: int, r: int) -> Step:
    """Count the parts of db, one fp32 (out, R) per 256 rows, written by the pass over dy and read again."""
    return Step(2 * 4.0 * math.ceil(m / 256) * out * r)


def _casts(group: Group, r: int, *, backward: bool) -> Iterator[Step]:
    """Count the casts of A and B from fp32 to bf16 in forward; in backward again, or of their gradients to fp32."""
    for out, features in group.shapes * (2 if backward else 1):
        yield from (Step((4 + E) * r * features), Step((4 + E) * r * out))


def _our_casts(group: Group, r: int, *, backward: bool) -> Iterator[Step]:
    """Count our casts, and the multiplication of s into B."""
    yield from _casts(group, r, backward=backward)
    yield from (Step(8 * r * out) for out, _ in group.shapes * (2 if backward else 1))


def fused(out: int, features: int, m: int) -> Step:
    """Count one product that decodes its weight."""
    return Step(quantized_bytes(out, features) + E * m * (out + features), 2.0 * m * out * features, FUSED_EFFICIENCY)


def ours_fused(group: Group, m: int, r: int, *, backward: bool) -> Iterator[Step]:
    """Count ours with the decoding GEMM, which adds the adapter's terms; the linears' parts of dX are summed."""
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
    """Count PEFT's passes over (M, O) and (M, I); without autocast the adapter's products are fp32."""
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
    """Count Unsloth's sequence."""
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
