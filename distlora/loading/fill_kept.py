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
from distlora.architecture.low_bit_headers import LowBitSegment, Nf4Tensor
from distlora.architecture.safetensors_headers import Segment, check_stored_shape, overlaps
from distlora.config import UserError
from distlora.loading.quantize import CHUNK_GROUPS
from distlora.model.frozen_linear import FrozenTensor
from distlora.parallel import Backend
from distlora.weights.low_bit import CODECS
from distlora.weights.low_bit.nf4 import read_groups
from distlora.weights.reader import Reader, check_finite
from distlora_kernels.formats import Format
from distlora_kernels.reference import GROUP


@torch.no_grad()
def fill_kept(weight: FrozenTensor, segments: Sequence[Segment], reader: Reader, backend: Backend, name: str) -> None:
    """Fill the rank's groups, and the replicated parts, with the stored bytes.

    The codec's padding fills the last group, and zeros tiles past the edges. Raises UserError for segments that are
    not whole blocks of the format, and for NaN or Inf.
    """
    format, kept = weight.format, kept_weight(name, segments)
    assert format is not None, f"{name} is dense"
    assert kept is not None, f"{name} is dense on disk"
    assert kept.format == format.name, f"{name} is in {kept.format}, not {format.name}"
    assert isinstance(segments[0], LowBitSegment), "kept_weight refuses others"
    tensor, codec = segments[0].tensor, CODECS[segments[0].tensor.codec]
    if len(segments) == 1:
        check_stored_shape(name, tensor.stored_shape, weight.shape)
    replicated = [weight.get_buffer(part.name) for part in format.replicated]
    for buffer, value in zip(replicated, codec.replicated(tensor, reader), strict=True):
        buffer.copy_(value)
    if isinstance(tensor, Nf4Tensor):
        _fill_nf4(weight, tensor, reader, backend, name)
        return
    parts, first_group = backend.local_groups(weight)
    for local, part in zip(parts, format.parts, strict=True):
        local.fill_(codec.padding.get(part.name, 0))
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
        for local, values in zip(rank_parts, chunk, strict=True):
            _place(local, values.to(local.device), per_group, name)
        on_device = [local.to(backend.ranks.device) for local in rank_parts] + replicated
        check_finite(name, *rank_parts, format.dequantize_groups(on_device, torch.float32))


def _fill_nf4(weight: FrozenTensor, tensor: Nf4Tensor, reader: Reader, backend: Backend, name: str) -> None:
    """Fill the rank's groups of a weight in NF4, whose parts lie group after group on disk as in memory."""
    parts, first = backend.local_groups(weight)
    stop = min(first + len(parts[0]), weight.num_groups)
    for start, chunk in reader.ahead(functools.partial(read_groups, tensor, reader), first, stop, CHUNK_GROUPS):
        for local, values in zip(parts, chunk, strict=True):
            local[start - first :][: len(values)] = values
    # No weight of a block exceeds this sum: any code is finite.
    check_finite(name, parts[-1] + abs(tensor.offset or 0.0))


def read_blocks(
    format: Format, segments: Sequence[Segment], width: int, reader: Reader, first: int, stop: int
) -> tuple[Tensor, ...]:
    """Return the parts of blocks [first, stop) of a weight of rows of `width`, fewer at its end: each (n, numbers)."""
    pieces = []
    for segment, low, high in overlaps(segments, first, stop, lambda each: _blocks_in(format, each.num_bytes, width)):
        assert isinstance(segment, LowBitSegment), "kept_weight refuses others"
        start = _blocks_in(format, segment.offset, width) + low
        pieces.append(CODECS[segment.tensor.codec].blocks(segment.tensor, reader, start, high - low))
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
