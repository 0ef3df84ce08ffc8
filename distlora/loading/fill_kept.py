"""Fill a rank's groups of a weight kept in the checkpoint's format (quant=keep), a chunk at a time.

Nothing is quantized, and ranks do not communicate: each one reads the blocks of its own groups. Memory beyond the
shard: two chunks as they are read, and one decoded to look for NaN and Inf.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from distlora.architecture.kept_weights import kept_weight
from distlora.architecture.low_bit_headers import LowBitSegment
from distlora.architecture.safetensors_headers import Segment, check_stored_shape
from distlora.config import UserError
from distlora.loading.quantize import CHUNK_GROUPS
from distlora.model.frozen_linear import FrozenTensor
from distlora.parallel import Backend
from distlora.weights.low_bit import CODECS
from distlora.weights.reader import Reader, all_finite
from distlora_kernels.formats import Format
from distlora_kernels.reference import GROUP


@torch.no_grad()
def fill_kept(weight: FrozenTensor, segments: Sequence[Segment], reader: Reader, backend: Backend, name: str) -> None:
    """Fill the rank's groups with the stored bytes; zeros fill the last group, and tiles past the edges.

    Raises UserError for segments that are not whole blocks of the format, and for NaN or Inf.
    """
    format, kept = weight.format, kept_weight(name, segments)
    assert format is not None, f"{name} is dense"
    assert kept is not None, f"{name} is dense on disk"
    assert kept.format == format.name, f"{name} is in {kept.format}, not {format.name}"
    if len(segments) == 1 and isinstance(segments[0], LowBitSegment):
        check_stored_shape(name, segments[0].tensor.stored_shape, weight.shape)
    parts, first_group = backend.local_groups(weight)
    for part in parts:
        part.zero_()
    per_group, stop = GROUP // format.block, min(first_group + len(parts[0]), weight.num_groups)
    first, last = first_group * per_group, stop * per_group
    # A row of tiles is read at once, as its codes are rows of the matrix.
    across = 1 if format.tile is None else -(-weight.shape[-1] // format.tile[1])
    aligned = min(-(-first // across) * across, last)
    read = functools.partial(read_blocks, format, segments, weight.shape[-1], reader)
    step = -(-CHUNK_GROUPS // across) * across * per_group
    chunks = (reader.ahead(read, *ends, step) for ends in ((first, aligned), (aligned, last)))
    for start, chunk in itertools.chain.from_iterable(chunks):
        group = start // per_group - first_group
        groups = -(-len(chunk[0]) // per_group)
        rank_parts = [part[group : group + groups] for part in parts]
        for part, values in zip(rank_parts, chunk, strict=True):
            _place(part, values.to(part.device), per_group, name)
        on_device = [part.to(backend.ranks.device) for part in rank_parts]
        if not all(map(all_finite, (*rank_parts, format.dequantize_groups(on_device, torch.float32)))):
            raise UserError(f"{name} holds NaN or Inf weights; the checkpoint is damaged, download it again")


def read_blocks(
    format: Format, segments: Sequence[Segment], width: int, reader: Reader, first: int, stop: int
) -> tuple[Tensor, ...]:
    """Return the parts of blocks [first, stop) of a weight of rows of `width`, fewer at its end: each (n, numbers)."""
    pieces, before = [], 0
    for segment in segments:
        assert isinstance(segment, LowBitSegment), "kept_weight refuses others"
        count = _blocks_in(format, segment.num_bytes, width)
        low, high = max(first - before, 0), min(stop - before, count)
        if low < high:
            start = _blocks_in(format, segment.offset, width) + low
            pieces.append(CODECS[segment.tensor.codec].blocks(segment.tensor, reader, start, high - low))
        before += count
    return tuple(part[0] if len(part) == 1 else torch.cat(part) for part in zip(*pieces, strict=True))


def _blocks_in(format: Format, weights: int, width: int) -> int:
    """Return the number of blocks of whole rows, or of whole blocks."""
    if format.tile is None:
        return -(-weights // format.block)
    return -(-weights // width // format.tile[0]) * -(-width // format.tile[1])


def _place(part: Tensor, values: Tensor, per_group: int, name: str) -> None:
    """Copy what some blocks have of a part (groups, ...) to their places. One number of a group is that of all."""
    if part.dim() > 1:
        part.view(len(part) * per_group, -1)[: len(values)] = values
        return
    part.copy_(values[::per_group, 0])
    given = part.view(torch.int32).repeat_interleave(per_group)[: len(values)]
    if not torch.equal(given, values[:, 0].view(torch.int32)):  # Bits: NaN has its own error.
        raise UserError(
            f"quant=keep cannot keep {name}: tensors with different global scales share a group of {GROUP:,} weights; "
            "set quant=nf4, which quantizes it again"
        )
