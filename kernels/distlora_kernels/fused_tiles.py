"""How fused_triton.py cuts its products into tiles: small tables a generation of GPUs and number of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """How a product is cut: a program makes (rows, width) outputs, `depth` products of each at a time."""

    rows: int
    width: int
    depth: int
    warps: int
    stages: int
    programs: int
    """That fit a multiprocessor at once: as many as the sum is split for."""


HOPPER = (9, 0)
"""Compute capability of the H100 and H200: its matrix instruction is wgmma."""

# Rows up to which a configuration serves -> the configuration; more rows are cut into several programs. Chosen by what
# compiles without spills and how many programs then fit (`distlora bench kernels --offline`); none of it is measured.
LINEAR_HOPPER = {
    16: Config(16, 128, 128, 8, 4, 2),
    32: Config(32, 128, 128, 8, 4, 2),
    64: Config(64, 128, 128, 8, 3, 1),
    128: Config(128, 128, 128, 8, 3, 1),
}
# Every other architecture, in 99 KiB of shared memory: W x^T by mma.sync reads all of x in each warp, so wide tiles of
# rows gain nothing.
LINEAR = {
    16: Config(16, 64, 128, 4, 4, 3),
    32: Config(32, 64, 128, 4, 3, 2),
    64: Config(64, 128, 128, 8, 3, 1),
}
DX_HOPPER = {
    64: Config(64, 128, 64, 4, 3, 2),
    128: Config(128, 128, 64, 8, 3, 1),
}
"""Few rows too take wgmma with 64: mma.sync on tiles of 16 rows needs more instructions a weight."""
DX = {
    16: Config(16, 128, 32, 4, 4, 4),
    32: Config(32, 128, 64, 4, 3, 2),
    64: Config(64, 128, 64, 8, 3, 1),
    128: Config(128, 128, 64, 8, 3, 1),
}


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that a device is treated as: the CPU's interpreter as an H100. torch.compile asks it once
    and puts no call into the graph.
    """
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else HOPPER


def linear_config(capability: tuple[int, int], m: int, dtype: torch.dtype) -> Config:
    """The configuration of x W^T for M rows."""
    return _config(LINEAR_HOPPER if capability == HOPPER else LINEAR, LINEAR, m, dtype)


def dx_config(capability: tuple[int, int], m: int, dtype: torch.dtype) -> Config:
    """The configuration of dy W for M rows."""
    return _config(DX_HOPPER if capability == HOPPER else DX, DX, m, dtype)


def _config(table: dict[int, Config], smallest: dict[int, Config], m: int, dtype: torch.dtype) -> Config:
    if dtype == torch.float32:
        # Without matrix instructions and with operands twice as wide, the others would not fit the registers.
        return smallest[16]
    return next((config for rows, config in table.items() if m <= rows), table[max(table)])


def k_width(capability: tuple[int, int], nested: bool) -> int:
    """Neighbouring k that the matrix instruction takes from one thread. 2; but Triton makes it 4 for mma.sync where
    bytes (the scales) are loaded on the way to the operand. A wrong one costs time, not correctness.
    """
    return 4 if nested and capability != HOPPER else 2


def ranks_at_a_time(rank: int | None) -> int:
    """Ranks of an adapter that are taken at a time: what is left of the last time is padding.

    Never 16: Triton gives loads of one shape one layout, a tile of b would then have that of the words of codes, and
    a thread 32 bytes of these instead of the 16 that the renumbering counts on.
    """
    return 32 if rank is None or rank <= 32 else 64
