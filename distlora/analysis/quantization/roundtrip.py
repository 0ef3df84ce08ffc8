"""A weight there and back through a 4-bit format, a chunk of groups at a time, and the sums that errors are made of.

A tensor is read twice: for the absmax of its blocks, whose mean the second level needs, and for the round trip itself.
So what is in memory beside one chunk is an absmax for every 64 weights, whatever the tensor's size. NF4 and int4 share
the absmax of a block, and with it the whole second level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distlora.loading.quantize import DoubleQuantizedAbsmax
from distlora_kernels import nf4, reference

CHUNK = 64 * nf4.GROUP
"""Weights at once: 4 MiB in fp32, which stays in a core's cache."""

DENSE = "bf16"
"""The name of the 16-bit format beside the 4-bit ones."""


class FourBit(NamedTuple):
    """A 4-bit format with blocks of 64 and double quantization."""

    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    """flat (n,) -> codes (G, 8192) uint8, absmax (G, 256) fp32."""
    dequantize: Callable[..., Tensor]
    """(codes, scales, group_scale, offset, *, shape, dtype) -> the weight."""


INT4_LEVELS = tuple(k / 7 for k in range(-7, 8))
"""The levels of QLoRA's "Int4" (arXiv 2305.14314, table 2), bitsandbytes' linear 4-bit map, as fractions of a block's
absmax. It is stored like NF4: blocks of 64, two codes per byte, double quantization. The 16th code is unused, since a
16th level would cost the zero or the symmetry."""
INT4_ZERO_CODE = INT4_LEVELS.index(0.0)


def quantize_int4(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Flat (n,) of any float dtype -> codes (G, 8192) uint8 and absmax (G, 256) fp32, as `nf4.quantize_blocks`."""
    return reference.quantize_blocks(flat, INT4_LEVELS)


def dequantize_int4(
    codes: Tensor, scales: Tensor, group_scale: Tensor, offset: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """W = round_to_nearest_even(fl(level[code] * absmax)) in `dtype`, shaped `shape`, as `nf4.nf4_dequantize`."""
    absmax = reference.dequantize_absmax(scales, group_scale, offset)
    return reference.dequantize_blocks(codes, absmax, shape=shape, dtype=dtype, levels=INT4_LEVELS)


FORMATS = {
    "nf4": FourBit(nf4.quantize_blocks, nf4.nf4_dequantize),
    "int4": FourBit(quantize_int4, dequantize_int4),
}


def round_trip(
    chunk: Tensor, format: FourBit, second: DoubleQuantizedAbsmax, first_group: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, int]:
    """Return (the restored flat chunk in `dtype`; its stored bytes without the tensor's offset)."""
    codes, _ = format.quantize(chunk)
    scales, group_scale, offset = second.groups(first_group, len(codes))
    restored = format.dequantize(codes, scales, group_scale, offset, shape=tuple(chunk.shape), dtype=dtype)
    return restored, codes.nbytes + scales.nbytes + group_scale.nbytes


@dataclass(slots=True)
class FormatSums:
    """Errors and bytes of a format over some weights."""

    error: float = 0.0
    """Sum of the squared errors."""
    largest: float = 0.0
    """Largest error."""
    num_bytes: int = 0

    def add(self, other: FormatSums) -> None:
        """Add the sums of another chunk."""
        self.error += other.error
        self.largest = max(self.largest, other.largest)
        self.num_bytes += other.num_bytes


@dataclass(slots=True)
class Sums:
    """Sums over weights, from which everything that is reported of a tensor or of many follows. fp64."""

    numel: int = 0
    powers: list[float] = field(default_factory=lambda: [0.0] * 4)
    """Sums of w, w^2, w^3 and w^4."""
    formats: dict[str, FormatSums] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Add the sums of another tensor."""
        self.numel += other.numel
        self.powers = [mine + theirs for mine, theirs in zip(self.powers, other.powers, strict=True)]
        for name, sums in other.formats.items():
            self.formats.setdefault(name, FormatSums()).add(sums)

    def relative_error(self, format: str) -> float:
        """||w - w'|| / ||w|| (Frobenius)."""
        return math.sqrt(self.formats[format].error / self.powers[1]) if self.powers[1] else 0.0

    def snr_db(self, format: str) -> float | None:
        """10 log10(||w||^2 / ||w - w'||^2); None where nothing was lost."""
        error = self.formats[format].error
        return 10 * math.log10(self.powers[1] / error) if error and self.powers[1] else None

    def bits(self, format: str) -> float:
        """Return the stored bits per weight, padding and second level included."""
        return 8 * self.formats[format].num_bytes / self.numel

    @property
    def std(self) -> float:
        """Return the standard deviation of the weights."""
        mean, square = self.powers[0] / self.numel, self.powers[1] / self.numel
        return math.sqrt(max(square - mean**2, 0.0))

    @property
    def excess_kurtosis(self) -> float | None:
        """E(w - m)^4 / var^2 - 3: 0 for a normal distribution, -1.2 for a uniform one; None for constant weights."""
        mean, square, cube, fourth = (power / self.numel for power in self.powers)
        variance = square - mean**2
        if variance <= 1e-30:
            return None
        return (fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4) / variance**2 - 3


def measure(chunks: Callable[[], Iterator[Tensor]], numel: int) -> Sums:
    """Measure both 4-bit formats and bf16 on one tensor of `numel` weights, dequantized in fp32.

    Each call of `chunks` reads the tensor again, in flat pieces of whole groups (but the last). Raises ValueError for
    NaN and Inf.
    """
    second = DoubleQuantizedAbsmax.of(chunks(), numel)
    sums = Sums(formats={name: FormatSums() for name in (*FORMATS, DENSE)})
    first_group = 0
    for chunk in chunks():
        weights = chunk.float()
        sums.add(Sums(weights.numel(), _powers(weights)))
        for name, format in FORMATS.items():
            restored, num_bytes = round_trip(chunk, format, second, first_group)
            sums.formats[name].add(_difference(weights, restored, num_bytes))
        sums.formats[DENSE].add(_difference(weights, weights.bfloat16().float(), 2 * weights.numel()))
        first_group += nf4.num_groups(chunk.numel())
    for name in FORMATS:
        sums.formats[name].num_bytes += second.offset.nbytes
    return sums


def _powers(weights: Tensor) -> list[float]:
    """Return the sums of w, w^2, w^3 and w^4."""
    exact = weights.double()
    squares = exact * exact
    return [float(power.sum()) for power in (exact, squares, squares * exact, squares * squares)]


def _difference(weights: Tensor, restored: Tensor, num_bytes: int) -> FormatSums:
    error = weights - restored
    exact = error.double()
    return FormatSums(float((exact * exact).sum()), float(error.abs().max()), num_bytes)


REFERENCE_SIZE = 2 * CHUNK
"""Two million weights: the figures are good to three digits."""


def _laplace(generator: torch.Generator) -> Tensor:
    uniform = torch.rand(REFERENCE_SIZE, generator=generator, dtype=torch.float64) - 0.5
    return (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()


DISTRIBUTIONS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "uniform": lambda generator: torch.rand(REFERENCE_SIZE, generator=generator) * 2 - 1,
    "normal": lambda generator: torch.randn(REFERENCE_SIZE, generator=generator),
    "Laplace": _laplace,
}
"""Excess kurtosis -1.2, 0 and 3. Their scale does not matter: each block is divided by its absmax."""


def measure_references() -> dict[str, Sums]:
    """Return the sums of each distribution, equal on all machines of a kind (one seed)."""
    found = {}
    for name, draw in DISTRIBUTIONS.items():
        weights = draw(torch.Generator().manual_seed(0))
        found[name] = measure(lambda weights=weights: iter(weights.split(CHUNK)), REFERENCE_SIZE)  # type: ignore[misc]
    return found
