"""Sizes of the formats that frozen weights are kept in, without torch: those of `distlora_kernels.formats`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

GROUP = 16_384
"""Weights of a group."""


class PartSize(NamedTuple):
    """One tensor of a format."""

    elements: int
    """Elements per group."""
    itemsize: int
    """Bytes per element."""


class LowBitFormat(NamedTuple):
    """The sizes of a format."""

    parts: tuple[PartSize, ...]
    """Tensors that share the groups; the first holds the codes."""
    replicated_bytes: int = 0
    """Bytes per weight that every rank has."""
    tile: tuple[int, int] | None = None
    """Rows and columns of the tile that a group holds; None if a group is a run of weights."""
    block: int = GROUP
    """Neighbouring weights that are decoded together."""
    label: str = ""
    """Name in text for users."""

    @property
    def group_bytes(self) -> int:
        """Stored bytes per group."""
        return sum(part.elements * part.itemsize for part in self.parts)

    def num_groups(self, shape: Sequence[int]) -> int:
        """Return the number of groups of a weight of this shape."""
        if self.tile is None:
            return -(-math.prod(shape) // GROUP)
        rows, columns = self.tile
        return -(-math.prod(shape[:-1]) // rows) * -(-shape[-1] // columns)

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Return the stored bytes of a weight of this shape."""
        return self.num_groups(shape) * self.group_bytes + self.replicated_bytes


_GGUF_BLOCKS = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q2_K": (256, 84),
    "q3_K": (256, 110),
    "q4_K": (256, 144),
    "q5_K": (256, 176),
    "q6_K": (256, 210),
}
"""Weights and bytes of the blocks of ggml's types."""

LOW_BIT_FORMATS: Mapping[str, LowBitFormat] = {
    "nf4": LowBitFormat((PartSize(8192, 1), PartSize(256, 1), PartSize(1, 4)), 4, block=64, label="NF4"),
    "nf4_absmax": LowBitFormat((PartSize(8192, 1), PartSize(256, 4)), block=64, label="NF4"),
    "mxfp4": LowBitFormat((PartSize(8192, 1), PartSize(512, 1)), block=32, label="MXFP4"),
    "nvfp4": LowBitFormat((PartSize(8192, 1), PartSize(1024, 1), PartSize(1, 4)), block=16, label="NVFP4"),
    "fp8_block": LowBitFormat((PartSize(GROUP, 1), PartSize(1, 4)), tile=(128, 128), label="FP8 in 128 x 128 blocks"),
    "int8": LowBitFormat((PartSize(GROUP, 1), PartSize(128, 4)), block=128, label="int8 in groups of 128"),
    **{
        f"int4_g{size}{dtype}{zeros}": LowBitFormat(
            (PartSize(8192, 1), PartSize(GROUP // size, 2), *([PartSize(GROUP // size, 1)] if zeros else [])),
            block=size,
            label=f"int4 in groups of {size}",
        )
        for size in (32, 64, 128)
        for dtype in ("", "_fp16")
        for zeros in ("", "_zeros")
    },
    **{
        name: LowBitFormat((PartSize(GROUP // block * size, 1),), block=block, label=name[0].upper() + name[1:])
        for name, (block, size) in _GGUF_BLOCKS.items()
    },
}


def labels(formats: Iterable[str]) -> list[str]:
    """Return the names of formats in text for users, each once."""
    return list(dict.fromkeys(LOW_BIT_FORMATS[format].label for format in formats))


def is_nf4(format: str | None) -> bool:
    """Return whether products can decode weights of the format themselves."""
    return format in ("nf4", "nf4_absmax")
