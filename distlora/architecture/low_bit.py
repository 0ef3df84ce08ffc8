"""Sizes of the formats that frozen weights are kept in, without torch: those of `distlora_kernels.formats`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


LOW_BIT_FORMATS: Mapping[str, LowBitFormat] = {
    "nf4": LowBitFormat((PartSize(8192, 1), PartSize(256, 1), PartSize(1, 4)), 4),
    "nf4_absmax": LowBitFormat((PartSize(8192, 1), PartSize(256, 4))),
}


def is_nf4(format: str | None) -> bool:
    """Return whether products can decode weights of the format themselves."""
    return format in ("nf4", "nf4_absmax")
