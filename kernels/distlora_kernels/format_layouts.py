"""Name the formats of frozen weights and the tensors that each stores, without torch. `formats/` has their code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

GROUP = 16_384
"""Weights in a group, the unit of sharding."""
TILE = 128
"""Rows and columns of a tile, whose weights are a group."""
_ITEMSIZES = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4}


class Part(NamedTuple):
    """A tensor of a format: (G, *shape) for G groups, or `shape` if it is replicated."""

    name: str
    """Name of the Parameter or buffer in a module."""
    shape: tuple[int, ...]
    dtype: str
    """Name of the dtype in torch."""

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _ITEMSIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of `shape`."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, eq=False)
class FormatLayout:
    """The tensors of a format. A group is a run of 16,384 weights, or a tile of the matrix (E O, I)."""

    name: str
    label: str
    """Name in text for users."""
    block: int
    """Number of neighbouring weights that are decoded together."""
    parts: tuple[Part, ...]
    """Parts that share dim 0, the groups; the first holds the codes."""
    replicated: tuple[Part, ...] = ()
    """Parts that every rank has whole."""
    tile: tuple[int, int] | None = None
    """Rows and columns of the tile that a group holds; None if the format is flat."""

    @property
    def group_bytes(self) -> int:
        """Stored bytes per group, which are also the gathered bytes."""
        return sum(part.nbytes for part in self.parts)

    @property
    def replicated_bytes(self) -> int:
        """Bytes per weight that every rank has."""
        return sum(part.nbytes for part in self.replicated)

    @property
    def blocks_per_group(self) -> int:
        """Number of blocks in a group; 1 if it is a tile."""
        return GROUP // self.block

    def num_groups(self, shape: Sequence[int]) -> int:
        """Return the number of groups of a weight of this shape."""
        return -(-math.prod(shape) // GROUP) if self.tile is None else math.prod(self.tiles(shape))

    def tiles(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the rows and columns of tiles of a weight of this shape."""
        assert self.tile is not None, f"{self.name} is flat"
        return -(-math.prod(shape[:-1]) // self.tile[0]), -(-shape[-1] // self.tile[1])

    def groups_of_expert(self, shape: Sequence[int], expert: int) -> tuple[int, int]:
        """Return the first group that holds weights of an expert of a weight (E, O, I), and the end of them."""
        if self.tile is None:
            per_expert = math.prod(shape[1:])
            return expert * per_expert // GROUP, -(-(expert + 1) * per_expert // GROUP)
        (height, _), (_, wide), rows = self.tile, self.tiles(shape), shape[1]
        return expert * rows // height * wide, -(-(expert + 1) * rows // height) * wide

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Return the stored bytes of a weight of this shape, with the replicated parts."""
        return self.num_groups(shape) * self.group_bytes + self.replicated_bytes


_CODES, _BYTES = Part("codes", (GROUP // 2,), "uint8"), Part("codes", (GROUP,), "uint8")
_GGML_BLOCKS = {
    32: {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34},
    256: {"q2_K": 84, "q3_K": 110, "q4_K": 144, "q5_K": 176, "q6_K": 210},
}
"""Bytes of the blocks of ggml's types, by their weights."""


def _int4(block: int) -> Iterator[FormatLayout]:
    """Yield the formats of int4 in groups of `block`: by the dtype of the scales, without and with zero points."""
    zeros = Part("zeros", (GROUP // block,), "uint8")
    for dtype, suffix in (("bfloat16", ""), ("float16", "_fp16")):
        parts, name = (_CODES, Part("scales", (GROUP // block,), dtype)), f"int4_g{block}{suffix}"
        yield FormatLayout(name, f"int4 in groups of {block}", block, parts)
        yield FormatLayout(f"{name}_zeros", f"int4 in groups of {block}", block, (*parts, zeros))


_LAYOUTS = (
    FormatLayout(
        *("nf4", "NF4", 64, (_CODES, Part("scales", (256,), "uint8"), Part("group_scale", (), "float32"))),
        replicated=(Part("offset", (), "float32"),),
    ),
    FormatLayout("nf4_absmax", "NF4", 64, (_CODES, Part("absmax", (256,), "float32"))),
    FormatLayout("mxfp4", "MXFP4", 32, (_CODES, Part("scales", (512,), "uint8"))),
    FormatLayout("nvfp4", "NVFP4", 16, (_CODES, Part("scales", (1024,), "uint8"), Part("global_scale", (), "float32"))),
    FormatLayout("int8", "int8 in groups of 128", 128, (_BYTES, Part("scales", (128,), "float32"))),
    FormatLayout(
        "fp8_block", "FP8 in 128 x 128 blocks", GROUP, (_BYTES, Part("scales", (), "float32")), tile=(TILE, TILE)
    ),
    *(layout for block in (32, 64, 128) for layout in _int4(block)),
    *(
        FormatLayout(name, name[0].upper() + name[1:], block, (Part("blocks", (GROUP // block * nbytes,), "uint8"),))
        for block, types in _GGML_BLOCKS.items()
        for name, nbytes in types.items()
    ),
)
FORMAT_LAYOUTS = {layout.name: layout for layout in _LAYOUTS}
"""The formats by name. `formats.FORMATS` has each with its code."""


def shards_whole_experts(shape: Sequence[int], format: str | None, ranks: int) -> bool:
    """Return whether the shards of a weight (E, O, I) on so many ranks are the weights of E / ranks experts each.

    The rows are those of dim 0 that ranks shard: groups, or experts of a dense weight (`format` None).
    """
    experts, out, features = shape
    if experts % ranks != 0 or format is None:
        return experts % ranks == 0
    tile = FORMAT_LAYOUTS[format].tile
    rows = experts // ranks * out
    return rows * features % GROUP == 0 if tile is None else rows % tile[0] == 0


def labels(formats: Iterable[str]) -> list[str]:
    """Return the names of formats in text for users, each once."""
    return list(dict.fromkeys(FORMAT_LAYOUTS[format].label for format in formats))


def is_nf4(format: str | None) -> bool:
    """Return whether products can decode weights of the format themselves."""
    return format in ("nf4", "nf4_absmax")
