"""Quantize weights to the layout that a checkpoint ships them in: the inverse of codecs.py.

Each block has two candidates for its scale: the shipped one, and the one of the format's own rule for the new values.
Each weight gets the nearest code, and the block the scale with the smaller squared error. With the shipped scale an
unchanged weight keeps its code, so the error of a block is never larger than its change. Zero points and the global
scales of NVFP4, which fused layers of servers share, stay as they are shipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from distlora.weights.low_bit import CODECS
from distlora.weights.low_bit.codecs import Fp4Codec, MatrixRows, PackedCodec, powers_of_two
from distlora.weights.reader import TORCH_DTYPES
from distlora_kernels.formats.flat import E2M1

_MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
"""Middles of neighbouring e2m1 magnitudes; those of which the even code is the upper one are a little lower."""
_MIDDLES[1::2] = torch.nextafter(_MIDDLES[1::2], torch.zeros(()))
Map = Callable[[Tensor], Tensor]


class Grid(NamedTuple):
    """The values that a block can have: levels times its scale. Letters: n blocks, w weights of a block."""

    rule: Map
    """Returns the scales (n, 1) of the format's rule for blocks (n, w)."""
    nearest: Map
    """Rounds weights over their scales (n, w) to levels: to even, and saturating."""
    codes: Map
    """Returns the stored codes of rows of levels."""
    store: Map
    """Rounds scales to what is stored, a byte as uint8."""
    load: Map
    """Returns the scales that the codec computes with, of stored ones."""


def _exponents(scales: Tensor) -> Tensor:
    """Return the exponents of the next powers of two, ue8m0."""
    mantissas, exponents = torch.frexp(scales)
    return (exponents - (mantissas == 0.5).int() + 127).clamp(0, 254).to(torch.uint8)


def _scaled(at: MatrixRows) -> Grid:
    """FP8 or 8-bit integers: the scale is the largest magnitude over that of the codes."""
    is_fp8 = at.tensor.parts["codes"].dtype == "F8_E4M3"
    dtype, low, top = (torch.float8_e4m3fn, -448, 448) if is_fp8 else (torch.int8, -128, 127)
    stored = TORCH_DTYPES[at.tensor.parts["scales"].dtype]
    return Grid(
        rule=lambda blocks: blocks.abs().amax(1, keepdim=True) / top,
        nearest=lambda ratios: (ratios if is_fp8 else ratios.round()).clamp(low, top).to(dtype).float(),
        codes=lambda levels: levels.to(dtype),
        store=_exponents if stored.itemsize == 1 else lambda scales: scales.to(stored),
        load=powers_of_two if stored.itemsize == 1 else Tensor.float,
    )


def _fp4(at: MatrixRows) -> Grid:
    """MXFP4 by OCP's rule, 2 ** (floor(log2 max |W|) - 2), or NVFP4: max |W| / 6 in e4m3 over the global scale."""

    def codes(levels: Tensor) -> Tensor:
        numbers = torch.bucketize(levels.abs(), _MIDDLES) | torch.signbit(levels).long() << 3
        return (numbers[:, ::2] | numbers[:, 1::2] << 4).to(torch.uint8)

    def nearest(ratios: Tensor) -> Tensor:
        return torch.tensor(E2M1[:8])[torch.bucketize(ratios.abs(), _MIDDLES)].copysign(ratios)

    def rule(blocks: Tensor) -> Tensor:
        return torch.exp2(torch.frexp(blocks.abs().amax(1, keepdim=True)).exponent - 3.0)

    codec, e4m3, global_scale = CODECS[at.tensor.codec], torch.float8_e4m3fn, at.tensor.parts.get("global_scale")
    assert isinstance(codec, Fp4Codec)
    if global_scale is None:
        return Grid(rule, nearest, codes, _exponents, powers_of_two)
    shared = at.reader.read([global_scale], 0, 1)
    load, store = (torch.mul, torch.div) if codec.reciprocal else (torch.div, torch.mul)
    return Grid(
        rule=lambda blocks: blocks.abs().amax(1, keepdim=True) / 6,
        nearest=nearest,
        codes=codes,
        store=lambda scales: store(scales, shared).clamp(max=448).to(e4m3).view(torch.uint8),
        load=lambda stored: load(stored.view(e4m3).float(), shared),
    )


def _packed(at: MatrixRows) -> Grid:
    """compressed-tensors' integers: the smallest scale that is within half a step of every weight of the block."""
    tensor, codec = at.tensor, CODECS[at.tensor.codec]
    assert isinstance(codec, PackedCodec)
    _, stored, scales = codec.integers(at)
    top = (1 << tensor.bits) - 1
    zeros = stored.reshape(-1, 1).float()

    def rule(blocks: Tensor) -> Tensor:
        low, high = blocks.aminmax(dim=1, keepdim=True)
        return torch.maximum(-low / (zeros + 0.5), high / (top + 0.5 - zeros))

    def codes(levels: Tensor) -> Tensor:
        of_weights = stored.repeat_interleave(tensor.block[1], dim=1)[:, : levels.shape[1]]
        numbers = pad((levels + of_weights).to(torch.uint8), (0, -levels.shape[1] % (32 // tensor.bits)))
        return (numbers if tensor.bits == 8 else numbers[:, ::2] | numbers[:, 1::2] << 4).contiguous().view(torch.int32)

    return Grid(
        rule=rule,
        nearest=lambda ratios: (ratios.round() + zeros).clamp(0, top) - zeros,
        codes=codes,
        store=lambda values: values.to(scales.dtype),
        load=Tensor.float,
    )


GRIDS = {"scaled": _scaled, "mxfp4": _fp4, "nvfp4": _fp4, "modelopt_nvfp4": _fp4, "packed": _packed}
"""Functions that return the grid of rows [first, stop) of a stored matrix, by LowBitTensor.codec."""


@torch.no_grad()
def requantize(at: MatrixRows, values: Tensor) -> tuple[dict[str, Tensor], float]:
    """Return the codes and scales of `values` (rows, I) fp32, by part, and the squared error.

    The rows are whole rows of blocks.
    """
    (rows, width), (height, columns) = values.shape, at.tensor.block
    down, across = -(-rows // height), -(-width // columns)
    padded = pad(values, (0, across * columns - width, 0, down * height - rows))
    blocks = padded.view(down, height, across, columns).transpose(1, 2).reshape(down * across, -1)
    grid, shipped = GRIDS[at.tensor.codec](at), at.read("scales").reshape(-1, 1)
    candidates = []
    for stored in (shipped.view(torch.uint8) if shipped.itemsize == 1 else shipped, grid.store(grid.rule(blocks))):
        scales = grid.load(stored)
        levels = grid.nearest(torch.where(scales > 0, blocks / scales, 0.0))
        candidates.append((stored, levels, (levels * scales - blocks).square().sum(1, keepdim=True)))
    better = candidates[1][2] < candidates[0][2]
    chosen, levels, error = (torch.where(better, new, old) for old, new in zip(*candidates, strict=True))
    levels = levels.view(down, across, height, columns).transpose(1, 2).reshape(down * height, -1)[:rows, :width]
    return {"codes": grid.codes(levels), "scales": chosen}, float(error.double().sum())
