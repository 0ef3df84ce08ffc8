"""A rank's own rows of one weight: read, quantized and written into the shard, one chunk of groups at a time.

Memory beyond the shard: the read-ahead and the fp32 work of one chunk, and the fp32 absmax of the rank's own blocks
(1/64 of its weights), kept until the offset is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from distlora.config import UserError
from distlora.loading.reader import Reader
from distlora.loading.segments import Segment
from distlora.parallel import Backend
from distlora.quant import FrozenLinear
from distlora_kernels import nf4

CHUNK_GROUPS = 64
"""Groups quantized at once: a million weights, 4 MiB in fp32, which stays in a core's cache."""
CHUNK_ELEMENTS = CHUNK_GROUPS * nf4.GROUP


@torch.no_grad()
def quantize_into(
    linear: FrozenLinear, segments: Sequence[Segment], reader: Reader, backend: Backend, name: str
) -> None:
    """Fill the rank's rows of codes, scales and group_scale, and the replicated offset, of a quantized linear.

    The result is the slice of the whole tensor's quantization, bit for bit, on any number of ranks. Every rank must
    call it for every tensor, in the same order: the offset is the mean over all of them. Raises UserError for NaN or
    Inf.
    """
    numel = linear.in_features * linear.out_features
    codes, first_group = backend.local_rows(linear.codes)
    groups = codes.shape[0]
    absmax = torch.zeros(groups, nf4.BLOCKS_PER_GROUP, dtype=torch.float32, device=codes.device)
    stop = min((first_group + groups) * nf4.GROUP, numel)
    for start, chunk in reader.chunks(segments, first_group * nf4.GROUP, stop, CHUNK_ELEMENTS):
        row = start // nf4.GROUP - first_group
        chunk_codes, chunk_absmax = nf4.quantize_blocks(chunk.to(codes.device))
        codes[row : row + len(chunk_codes)] = chunk_codes
        absmax[row : row + len(chunk_codes)] = chunk_absmax
    if not bool(torch.isfinite(absmax).all()):
        raise UserError(
            f"{name} holds NaN or Inf weights, which NF4 cannot represent; the checkpoint is damaged, download it again"
        )

    offset = torch.tensor(_offset(absmax, linear, backend), dtype=torch.float32, device=codes.device)
    own_blocks = -(-max(stop - first_group * nf4.GROUP, 0) // nf4.BLOCK)
    scales, group_scale = nf4.quantize_absmax(absmax, offset, own_blocks)
    backend.local_rows(linear.scales)[0].copy_(scales)
    backend.local_rows(linear.group_scale)[0].copy_(group_scale)
    linear.offset.copy_(offset)  # type: ignore[operator]


def _offset(absmax: torch.Tensor, linear: FrozenLinear, backend: Backend) -> float:
    """The mean absmax over all ranks, from the sums of all groups; they are the same numbers on any number of ranks."""
    total_groups = linear.codes.shape[0]
    sums = nf4.absmax_group_sums(absmax)
    per_rank = -(-total_groups // backend.ranks.world) if backend.sharded else total_groups
    padded = torch.zeros(per_rank, dtype=torch.float64, device=sums.device)
    padded[: len(sums)] = sums
    num_blocks = -(-linear.in_features * linear.out_features // nf4.BLOCK)
    return nf4.absmax_offset(backend.gather_rows(padded), num_blocks)


@torch.no_grad()
def copy_into(
    parameter: nn.Parameter, segments: Sequence[Segment], reader: Reader, backend: Backend, name: str
) -> None:
    """Fill the rank's rows of a dense parameter, cast to its dtype. Raises UserError for NaN or Inf."""
    local, first_row = backend.local_rows(parameter)
    row_size = math.prod(parameter.shape[1:])
    flat = local.view(-1)
    start = first_row * row_size
    for first, chunk in reader.chunks(segments, start, start + flat.numel(), CHUNK_ELEMENTS):
        if not bool(torch.isfinite(chunk).all()):
            raise UserError(f"{name} holds NaN or Inf weights; the checkpoint is damaged, download it again")
        flat[first - start : first - start + chunk.numel()] = chunk
