"""Say what kernels allocate beside operands and results. The kernels and the planner take it from here. No torch.

The skinny kernels (skinny_triton.py) write sums that several programs share as fp32 parts, one per stripe of rows; what
they write follows from the tile and the split of a sum.
"""

from __future__ import annotations

from typing import NamedTuple

COUNTERS = {"cpu": 2**15, "cuda": 2**22}
"""Counters of a dropout mask that are computed at once: on a CPU the words stay in its cache, on a GPU they fill it."""
COUNTER_BYTES = 8 * 8
"""Bytes of one of them within philox: eight int64. Each makes the words of COLUMNS_PER_CALL inputs."""
COLUMNS_PER_CALL = 8

STRIPE_ELEMENTS = 2**20
"""Products that a magnitude's gradient holds at once, 4 MiB: with fewer, thread barriers cost more than the cache
saves."""
STRIPE_BYTES = 3 * 4 * STRIPE_ELEMENTS
"""Bytes of such a stripe: two operands and their product, fp32."""

RANK_MULTIPLE = 8
"""Multiple to which grouped products of experts round ranks up."""

PROGRAMS = 128
"""Programs that a sum is split for if the rows give fewer: about one per multiprocessor of an H100, each with three
tiles of 16 KB in flight (3 TB/s at 1 us needs 23 KB per multiprocessor)."""
GROUP = 8
"""Parts of db that are added at a time if there are more: a program reads a megabyte of L2 in 10 us, too long for one
program to add all parts of 512 columns."""
LARGEST_RANK_READ_ONCE = 32
"""Largest rank for which `dy` reads dy once for both products; beyond it the parts of db cost as much as a read."""
MOST_PARTS_BYTES = 2**28
"""Most bytes of the parts of db when dy is read once: 32,768 rows of 32,768 features at rank 16. Beyond it dy is read
twice (2 % of a linear's backward) to save memory."""


class KernelTile(NamedTuple):
    """Tile of a kernel: rows, columns (or summed length per iteration), ranks."""

    rows: int
    columns: int
    ranks: int
    num_warps: int
    num_stages: int


def tile_of(
    op: str, rank: int, tokens: int, itemsize: int, with_dropout: bool = False, *, copies: bool = False
) -> KernelTile:
    """Return the tile of an op for an adapter's rank and a row's tokens, without spills and within 99 KB.

    With dropout there are twice the threads: the generator, not memory, is the bottleneck. A rank that is not a
    multiple of 16 is read and written element by element, and the addresses fill registers: fewer rows at a time. A
    copy at rank 16 spills on sm_89 in Triton 3.6 with one tile more in flight.
    """
    ranks, odd = min(padded_rank(rank), 64), rank % 16 != 0
    warps = 8 if with_dropout or ranks > {"down": 16, "grad": 32}.get(op, 64) else 4
    if itemsize == 4:
        # No tensor cores (ieee): operands are in registers.
        rows, columns = {"down": (32, 32), "up": (32, 64), "dy": (64, 32), "grad": (32, 64)}[op]
        return KernelTile(_rows(rows, tokens), columns, min(ranks, 32), 4, 2)
    if op == "down":
        # More rows for more ranks: every tile of rows reads all of a from L2.
        if ranks == 16:
            return KernelTile(_rows(64, tokens), 128, ranks, warps, 3 if copies else 4)
        return KernelTile(_rows(128, tokens), 64, ranks, warps, 4)
    if op == "up":
        return KernelTile(_rows(64 if with_dropout else 128, tokens), 128, ranks, 8, 2)
    if op == "dy":
        return KernelTile(_rows(128 if odd else 256, tokens), 64, ranks, 8, 3 if odd else 2)
    rows = 32 if odd and ranks == 16 and not with_dropout else 64
    return KernelTile(_rows(rows, tokens), 128, ranks, warps, 3 if with_dropout else 4)


def padded_rank(rank: int) -> int:
    """Return the columns of an adapter's fp32 parts, for loads of 16 bytes."""
    return max(16, _power_of_2(rank))


def _rows(most: int, tokens: int) -> int:
    return min(most, max(16, _power_of_2(tokens)))


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


class Split(NamedTuple):
    """A sum that several programs share: the length of each part, and their number."""

    size: int
    parts: int


def split(length: int, grain: int, programs: int, wanted: int = PROGRAMS) -> Split:
    """Split `length` into equal parts, multiples of `grain`, for about `wanted` programs at `programs` per part."""
    grains = -(-length // grain)
    size = -(-grains // min(grains, max(1, wanted // programs))) * grain
    return Split(size, -(-length // size))


def split_over_rows(tile: KernelTile, tokens: int, columns: int, rank: int, batch: int = 1) -> Split:
    """Split the sum over the rows of one of `batch` sequences in the gradient of A or B (`columns`, `rank`)."""
    return split(tokens, tile.rows, -(-columns // tile.columns) * -(-rank // tile.ranks) * batch)


def reads_once(stripes: int, columns: int, rank: int) -> bool:
    """Return whether `dy` reads dy once, which takes parts of db for each stripe of rows."""
    return rank <= LARGEST_RANK_READ_ONCE and stripes * columns * padded_rank(rank) * 4 <= MOST_PARTS_BYTES


def parts_bytes(op: str, tokens: int, columns: int, rank: int, itemsize: int) -> int:
    """Return the bytes of the parts of a gradient (`columns`, `rank`): of A by `grad`, of B by `dy`."""
    stripes = -(-tokens // tile_of("dy", rank, tokens, itemsize).rows)
    if op == "dy" and reads_once(stripes, columns, rank):
        return stripes * columns * padded_rank(rank) * 4
    stripes = split_over_rows(tile_of("grad", rank, tokens, itemsize), tokens, columns, rank).parts
    return stripes * columns * rank * 4 if stripes > 1 else 0
