"""Define what a format of frozen weights is: how a weight lies in memory, on disk and on the network.

A weight in a format is some Parameters that share dim 0, the groups of 16,384 weights, so that a shard of any world
size begins and ends with a group. A flat format holds weight w, in row-major order, in group w // 16,384. A tiled one
holds the 128 x 128 tiles of the matrix (E O, I), row by row of tiles. Zeros fill the last group, or ragged tiles.

Letters: G groups, O out features, I in features, E experts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from distlora_kernels.dispatch import on_device_of, uses_triton
from distlora_kernels.format_layouts import FORMAT_LAYOUTS, GROUP, FormatLayout, Part

UNIT = 64
"""Weights by which kernels count an expert's: numbers of units fit 32 bits up to 2^37 weights."""


def dtype_of(part: Part) -> torch.dtype:
    """Return the dtype of a part's tensor."""
    dtype: torch.dtype = getattr(torch, part.dtype)
    return dtype


class Format(FormatLayout, ABC):
    """A format. Methods take `parts`: the weight's tensors in the order of `self.parts`, then `self.replicated`."""

    @classmethod
    def named(cls, name: str) -> Self:
        """Return a format with the name and the parts of an entry of FORMAT_LAYOUTS."""
        return cls(**vars(FORMAT_LAYOUTS[name]))

    @abstractmethod
    def dequantize(
        self, parts: Sequence[Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Return the weight in `dtype`: the reference library's value, rounded once. The device is that of the parts.

        `out`: contiguous memory of that dtype and number of elements; the result is then a view of it.
        """

    def dequantize_chosen(self, parts: Sequence[Tensor], ends: Tensor, out: Tensor) -> None:
        """Write the experts that have rows, of a weight (E, O, I), to `out` (E, O, I). Of others it is undefined.

        ends (E,) int32: end of each expert's rows. A GPU reads it on the device, and leaves out runs of 8,192 weights
        (rows of half a tile) without such experts, if an expert is whole units of UNIT weights, or rows of tiles.
        """
        self.check(parts, tuple(out.shape))
        if uses_triton(parts[0]):
            with on_device_of(parts[0]):
                counted = self.tile is not None or math.prod(out.shape[1:]) % UNIT == 0
                self.run_triton(parts, out, ends if counted else None)
            return
        for expert in torch.diff(ends, prepend=ends.new_zeros(1)).nonzero().flatten().tolist():
            out[expert] = self.slice(parts, tuple(out.shape), expert, out.dtype)

    def run_triton(self, parts: Sequence[Tensor], out: Tensor, ends: Tensor | None = None) -> None:
        """Write the weight to `out`, which has its shape, by the format's kernel; `ends`: `dequantize_chosen`."""
        raise NotImplementedError(f"{self.name} has no kernel")

    def quantize(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of flat weights (n,), each group by itself; zeros fill the last group.

        Only formats that the user can choose have it.
        """
        raise NotImplementedError(f"{self.name} is read from checkpoints, nothing is quantized to it")

    def check(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> None:
        """Assert that the parts have the shapes and dtypes of a weight of this shape."""
        groups = self.num_groups(shape)
        expected = [((groups, *part.shape), dtype_of(part)) for part in self.parts]
        expected += [(part.shape, dtype_of(part)) for part in self.replicated]
        given = [(tuple(part.shape), part.dtype) for part in parts]
        assert given == expected, f"a weight {shape} in {self.name} has {groups} groups; the parts are {given}"

    def groups_of(self, parts: Sequence[Tensor], first: int, stop: int) -> tuple[Tensor, ...]:
        """Return the parts of the groups from `first` to before `stop`."""
        shared = len(self.parts)
        return (*(part[first:stop] for part in parts[:shared]), *parts[shared:])

    def dequantize_groups(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return whole groups, (G, 16,384), with what fills the last one; a tile's weights row by row."""
        groups, (rows, columns) = parts[0].shape[0], self.tile or (1, GROUP)
        return self.dequantize(parts, shape=(groups * rows, columns), dtype=dtype).view(groups, GROUP)

    def in_rows(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return values of the groups' weights, or of runs of n neighbours, by row: (G, 16,384 / n) -> (O, I / n).

        n divides I, and 16,384 or the columns of a tile. Of a ragged tile the columns beyond I stay.
        """
        rows, columns = math.prod(shape[:-1]), shape[-1]
        if self.tile is None:
            return values.flatten()[: values.shape[1] * rows * columns // GROUP].view(rows, -1)
        tiles = self.tiles(shape)
        return values.view(*tiles, self.tile[0], -1).transpose(1, 2).reshape(tiles[0] * self.tile[0], -1)[:rows]

    def slice(self, parts: Sequence[Tensor], shape: tuple[int, ...], index: int, dtype: torch.dtype) -> Tensor:
        """Return one expert of a weight (E, O, I) in `dtype`, (O, I); it may be a view of some weights more."""
        matrix, (first, stop) = shape[1:], self.groups_of_expert(shape, index)
        groups = self.groups_of(parts, first, stop)
        if self.tile is None:
            size = math.prod(matrix)
            flat = self.dequantize_groups(groups, dtype).view(-1)
            return flat[index * size - first * GROUP :][:size].view(matrix)
        (height, _), (_, wide) = self.tile, self.tiles(shape)
        whole = self.dequantize(groups, shape=((stop - first) // wide * height, shape[2]), dtype=dtype)
        return whole[index * matrix[0] - first // wide * height :][: matrix[0]]

    def dequantize_rows(
        self, parts: Sequence[Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return some rows of a weight (O, I) in `dtype`: rows (n,) int64 -> (n, I). NF4 has no embeddings."""
        raise NotImplementedError(f"no rows of {self.name} are decoded alone")


def place(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the tensor to write a weight to: a new one, or `out`, checked, in the weight's shape."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    assert (out.numel(), out.dtype, out.device) == (math.prod(shape), dtype, device), f"{shape} {dtype} on {device}"
    assert out.is_contiguous(), out.stride()
    return out.view(shape)
