"""Calculate the memory of GPU kernels that sum over tokens in parts (distlora_kernels/skinny_launch.py)."""

from __future__ import annotations

_PARTS_BYTES = 2**28
"""What distlora_kernels.skinny_launch lets the parts of dB take before it reads dY twice."""
_RANK_READ_ONCE = 32
_PROGRAMS = 128
"""What it has of programs, if the rows alone give fewer."""


def parts_of_db(tokens: int, columns: int, rank: int, itemsize: int) -> int | None:
    """Return the bytes of the parts of dB, one per stripe of tokens; None if dY is read twice instead.

    See skinny_launch.dy and skinny_triton.tile_of.
    """
    rows = 64 if itemsize == 4 else 128 if rank % 16 else 256
    parts = -(-tokens // rows) * 4 * columns * rank
    return None if rank > _RANK_READ_ONCE or parts > _PARTS_BYTES else parts


def parts_over_rows(tokens: int, columns: int, rank: int, itemsize: int) -> int:
    """Return the bytes of the parts of dA or dB, as many as keep each processor busy.

    See skinny_launch._products_over_rows.
    """
    rows, tile, ranks = (32, 64, 32) if itemsize == 4 else (64, 128, 64)
    if itemsize != 4 and rank % 16 and rank <= 16:
        rows = 32
    programs = -(-columns // tile) * -(-rank // min(ranks, max(16, 1 << (rank - 1).bit_length())))
    grains = -(-tokens // rows)
    size = -(-grains // min(grains, max(1, _PROGRAMS // programs)))
    return -(-grains // size) * 4 * columns * rank
