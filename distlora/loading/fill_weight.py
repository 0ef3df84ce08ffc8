"""Fill a rank's part of one weight, a chunk at a time: quantized, cast, or kept as stored; and DoRA's norms of it.

Memory beyond the shard: the read-ahead and the fp32 work of one chunk, and the fp32 absmax of the rank's blocks (1/64
of its weights), kept until the offset is known. A weight that is kept in the checkpoint's format (quant=keep, a base in
NF4) takes two chunks as they are read, and one decoded to look for NaN and Inf; its ranks do not communicate.

DoRA's norms start from the sums of squares of each row, which may lie on two ranks. So that no bit depends on the
number of ranks, the squares of b = gcd(in_features, 16384) consecutive weights, which never cross a border of a row or
a group, are added in halves (the first half to the second, down to one); then those of a row likewise, all in fp64.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distlora.architecture.kept_weights import kept_weight
from distlora.architecture.low_bit_headers import LowBitSegment, Nf4Tensor
from distlora.architecture.safetensors_headers import Segment, check_stored_shape, overlaps
from distlora.architecture.tokens import Vocabulary
from distlora.config import UserError
from distlora.model.adapters import AdaptedLinear, TokenRows
from distlora.model.frozen_linear import FrozenTensor
from distlora.parallel import Backend, Ranks, whole_shape
from distlora.weights.decompose import Residual
from distlora.weights.low_bit import CODECS
from distlora.weights.low_bit.codecs import read_groups
from distlora.weights.reader import Reader, all_finite, check_finite
from distlora_kernels.formats import Format, nf4
from distlora_kernels.formats.fp8_block import in_tiles
from distlora_kernels.reference import GROUP

CHUNK_GROUPS = 64
"""Groups quantized at once: a million weights, 4 MiB in fp32, which fits into a core's cache."""
CHUNK_ELEMENTS = CHUNK_GROUPS * nf4.GROUP


@torch.no_grad()
def quantize_into(
    weight: FrozenTensor,
    segments: Sequence[Segment],
    reader: Reader,
    backend: Backend,
    name: str,
    *,
    residual: Residual | None = None,
) -> None:
    """Fill the rank's groups of a weight in a format, and its replicated parts.

    The result is the slice of the whole tensor's quantization, bit for bit, on any number of ranks. Every rank must
    call it for every tensor in the same order, because NF4's offset is a mean over all ranks. With `residual`, the
    weight minus the initial adapter is quantized. Raises UserError for NaN or Inf.
    """
    format = weight.format
    assert format is not None, f"{name} is dense"
    is_nf4 = format is nf4.NF4
    parts, first_group = backend.local_groups(weight)
    width, size = weight.shape[-1], run_size(format, weight.shape[-1])
    # The fewest weights that are whole groups, and the groups in them: a row of tiles, or one group.
    unit, in_unit = (nf4.GROUP, 1) if format.tile is None else (size, -(-width // format.tile[1]))
    device = backend.ranks.device  # Where the rows lie, or what they are gathered to from host memory.
    absmax = torch.zeros(len(parts[0]) if is_nf4 else 0, nf4.BLOCKS_PER_GROUP, device=device)
    filled = [parts[0], absmax] if is_nf4 else parts
    stop = min(-(-(first_group + len(parts[0])) // in_unit) * unit, weight.numel)
    for start, chunk in reader.chunks(segments, first_group // in_unit * unit, stop, size):
        row = start // unit * in_unit - first_group
        if residual is not None:
            chunk = residual.of(chunk, start)
        if not is_nf4 and not all_finite(chunk):
            raise _not_finite(name, format)
        on_device = chunk.to(device)
        quantized = nf4.quantize_blocks(on_device) if is_nf4 else quantize_run(format, on_device, width)
        for target, values in zip(filled, quantized, strict=True):
            own = values[max(-row, 0) : len(target) - row]  # Of a row of tiles, other ranks have others.
            target[max(row, 0) :][: len(own)] = own
    if not bool(torch.isfinite(absmax).all()):
        raise _not_finite(name, format)
    if is_nf4:
        own_blocks = -(-max(stop - first_group * nf4.GROUP, 0) // nf4.BLOCK)
        _quantize_absmax(weight, absmax, own_blocks, backend)


def _not_finite(name: str, format: Format) -> UserError:
    return UserError(
        f"{name} holds NaN or Inf weights, which {format.name.upper()} cannot represent; the checkpoint is damaged, "
        "download it again"
    )


def run_size(format: Format, width: int) -> int:
    """Return how many weights of a weight (O, I = `width`) to quantize at once: whole groups, or a row of tiles."""
    return CHUNK_ELEMENTS if format.tile is None else format.tile[0] * width


def quantize_run(format: Format, flat: Tensor, width: int) -> tuple[Tensor, ...]:
    """Return the parts of flat weights that begin with a group, or with a row of tiles of a weight (O, I = `width`)."""
    return format.quantize(flat if format.tile is None else in_tiles(flat.view(-1, width)))


def requantized(format: Format, flat: Tensor, width: int) -> Tensor:
    """Return what the format gives back of weights as `quantize_run` takes them, flat, in fp32."""
    shape = (len(flat),) if format.tile is None else (len(flat) // width, width)
    return format.dequantize(quantize_run(format, flat, width), shape=shape, dtype=torch.float32).view(-1)


def _quantize_absmax(weight: FrozenTensor, absmax: Tensor, num_blocks: int, backend: Backend) -> None:
    """Fill the rank's scales and group_scale, and the offset, from the absmax of its `num_blocks` blocks."""
    # The mean absmax over all ranks from the sums of all groups, which do not depend on the number of ranks.
    sums = nf4.absmax_group_sums(absmax)
    padded = torch.zeros(-(-weight.num_groups // backend.shards.count), dtype=torch.float64, device=sums.device)
    padded[: len(sums)] = sums
    mean = nf4.absmax_offset(backend.gather_rows(padded), -(-weight.numel // nf4.BLOCK))
    offset = torch.tensor(mean, dtype=torch.float32, device=absmax.device)
    (_, *parts), _ = backend.local_groups(weight)
    for part, values in zip(parts, nf4.quantize_absmax(absmax, offset, num_blocks), strict=True):
        part.copy_(values)
    weight.get_buffer("offset").copy_(offset)


@torch.no_grad()
def copy_into(
    parameter: Tensor,
    segments: Sequence[Segment],
    reader: Reader,
    backend: Backend,
    name: str,
    *,
    padding: int | None = None,
    residual: Residual | None = None,
) -> None:
    """Fill the rank's rows of a dense parameter or buffer, cast to its dtype. Raises UserError for NaN or Inf.

    With `padding` the segments may be shorter than the parameter, and the rest is filled with that value. With
    `residual` the initial adapter is subtracted before the cast.
    """
    local, first_row = backend.local_rows(parameter)
    row_size = math.prod(local.shape[1:])
    flat = local.view(-1)
    start = first_row * row_size
    stop = start + flat.numel()
    if padding is not None:
        stop = max(min(stop, sum(segment.numel for segment in segments)), start)
        flat[stop - start :] = padding
    for first, chunk in reader.chunks(segments, start, stop, CHUNK_ELEMENTS):
        check_finite(name, chunk)
        if residual is not None:
            chunk = residual.of(chunk, first)
        flat[first - start : first - start + chunk.numel()] = chunk


@dataclass(frozen=True, slots=True)
class DoubleQuantizedAbsmax:
    """The absmax of a tensor in 8 bits, computed from a stream of its weights. G groups.

    Beside one chunk of weights it keeps one absmax per 64 weights.
    """

    scales: Tensor
    """(G, 256) uint8."""
    group_scale: Tensor
    """(G,) fp32."""
    offset: Tensor
    """() fp32."""

    @classmethod
    def of(cls, chunks: Iterable[Tensor], numel: int) -> DoubleQuantizedAbsmax:
        """Build from flat chunks of `numel` weights in all, each of whole groups except the last.

        Raises ValueError for NaN and Inf.
        """
        absmax = torch.cat([_absmax(chunk) for chunk in chunks])
        if not bool(torch.isfinite(absmax).all()):
            raise ValueError("NaN or Inf weights")
        num_blocks = -(-numel // nf4.BLOCK)
        mean = nf4.absmax_offset(nf4.absmax_group_sums(absmax), num_blocks)
        offset = torch.tensor(mean, dtype=torch.float32, device=absmax.device)
        return cls(*nf4.quantize_absmax(absmax, offset, num_blocks), offset)

    def groups(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (scales, group_scale, offset) of some groups."""
        return self.scales[first : first + count], self.group_scale[first : first + count], self.offset


def _absmax(chunk: Tensor) -> Tensor:
    """Return the largest magnitude of each block of 64, 0 in the padding: (n,) -> (G, 256) fp32."""
    padded = torch.zeros(nf4.num_groups(chunk.numel()) * nf4.GROUP, dtype=torch.float32, device=chunk.device)
    padded[: chunk.numel()] = chunk
    return padded.view(-1, nf4.BLOCK).abs().amax(dim=1).view(-1, nf4.BLOCKS_PER_GROUP)


ROWS_PER_SUM = 256
"""Rows added up at once by one rank, so that a mean does not depend on the shards.

In fp64 they and all sums of a 128k vocabulary with 8,192 columns take 16 and 34 MB.
"""


@torch.no_grad()
def load_matrix(
    parameter: nn.Parameter,
    segments: Sequence[Segment],
    reader: Reader,
    backend: Backend,
    name: str,
    *,
    vocabulary: Vocabulary,
    token_rows: TokenRows | None,
    zeroed: int | None = None,
) -> None:
    """Fill the rank's rows of an embedding or LM head, and initialize its trained rows, which all ranks have.

    Row `zeroed` is set to zero, whatever the checkpoint has (padding, as transformers does it for some models).
    Every rank must call it for every matrix in the same order. Raises UserError for NaN or Inf.
    """
    copy_into(parameter, segments, reader, backend, name, padding=0 if vocabulary.has_grown else None)
    width = whole_shape(parameter)[1]
    local, first = backend.local_rows(parameter)
    if zeroed is not None and first <= zeroed < first + len(local):
        local[zeroed - first] = 0
    new_row = None
    if vocabulary.new:
        new_row = mean_row(segments, min(vocabulary.new.values()), width, reader, backend).to(parameter.dtype)
        for id in vocabulary.new.values():
            if first <= id < first + len(local):
                local[id - first] = new_row
    if token_rows is not None:
        new_ids = set(vocabulary.new.values())
        for row, id in zip(token_rows.rows, token_rows.ids, strict=True):
            # Rounded to the matrix's dtype, so that the untrained model is unchanged.
            stored = None if id in new_ids else reader.read(segments, id * width, (id + 1) * width)
            start = new_row if stored is None else stored.to(parameter.dtype)
            assert start is not None
            if id == zeroed:
                start = torch.zeros_like(start)
            check_finite(name, start)  # Another rank's shard may hold the row.
            row.copy_(start)


def mean_row(
    segments: Sequence[Segment], num_rows: int, width: int, reader: Reader, backend: Backend | None = None
) -> Tensor:
    """Return the mean of the matrix's first `num_rows` rows, (width,) fp64; the ranks divide the rows among them.

    Without a `backend` one process reads all of them; the bits are the same on the CPU.
    """
    ranks = Ranks(0, 1, torch.device("cpu"), None) if backend is None else backend.ranks
    starts = range(0, num_rows, ROWS_PER_SUM)
    sums = torch.zeros(len(starts), width, dtype=torch.float64, device=ranks.device)
    for index in range(ranks.rank, len(starts), ranks.world):
        sums[index] = _sum_of(segments, starts[index], num_rows, width, reader).to(ranks.device)
    if backend is not None:
        backend.sum_over_ranks(sums)  # All but one rank's are zeros, so nothing is rounded.
    total = torch.zeros_like(sums[0])
    for partial in sums:  # One after another.
        total += partial
    return total / num_rows


def _sum_of(segments: Sequence[Segment], start: int, num_rows: int, width: int, reader: Reader) -> Tensor:
    """Return the sum of ROWS_PER_SUM rows from `start` on, at most up to `num_rows`: (width,) fp64."""
    stop = min(start + ROWS_PER_SUM, num_rows)
    return reader.read(segments, start * width, stop * width).view(-1, width).double().sum(dim=0)


NORM_GROUPS = 16
"""Groups whose squares are in memory at once: 2 MiB in fp64."""


@torch.no_grad()
def fill_row_norms(linear: AdaptedLinear, backend: Backend) -> None:
    """Fill `row_norms_squared` from the weight as the GEMMs see it: dequantized and rounded to the run's dtype.

    Every rank must call it for every such linear in the same order, after the weight is complete.
    """
    assert linear.row_norms_squared is not None
    rows, columns = linear.out_features, linear.in_features
    format = linear.format
    size = format.tile[1] if format is not None and format.tile is not None else math.gcd(columns, nf4.GROUP)
    parts = [halved(part.double().square().view(-1, size)) for part in _own_parts(linear, backend)]
    sums = torch.cat([linear.row_norms_squared.new_empty(0, dtype=torch.float64), *parts])  # A rank may own nothing.
    if backend.sharded:
        unit = nf4.GROUP if linear.quantized else columns
        units = -(-(linear.num_groups if linear.quantized else rows) // backend.shards.count)
        padded = torch.zeros(units * unit // size, dtype=torch.float64, device=sums.device)
        padded[: len(sums)] = sums
        sums = backend.gather_rows(padded)
    if format is None:
        sums = sums[: rows * columns // size].view(rows, -1)
    else:
        sums = format.in_rows(sums.view(-1, nf4.GROUP // size)[: linear.num_groups], linear.shape)
    linear.row_norms_squared.copy_(halved(sums))


def halved(values: Tensor) -> Tensor:
    """Return the sum over m of (n, m), adding the first half to the second; zeros pad m to a power of 2."""
    length = values.shape[1]
    missing = (1 << (length - 1).bit_length()) - length
    if missing:
        values = torch.cat([values, values.new_zeros(values.shape[0], missing)], dim=1)
    while values.shape[1] > 1:
        first, second = values.chunk(2, dim=1)
        values = first + second
    return values[:, 0]


def _own_parts(linear: AdaptedLinear, backend: Backend) -> Iterator[Tensor]:
    """Yield the rank's weights as flat tensors in the dtype of the GEMMs: rows, or whole groups."""
    device, format = backend.ranks.device, linear.format  # Rows may lie in host memory.
    if format is None:
        rows = backend.local_rows(linear.weight)[0].flatten()
        yield from (part.to(device) for part in rows.split(NORM_GROUPS * nf4.GROUP))
        return
    parts, _ = backend.local_groups(linear)
    replicated = [linear.get_buffer(part.name) for part in format.replicated]
    for start in range(0, len(parts[0]), NORM_GROUPS):
        chunk = [part[start : start + NORM_GROUPS].to(device) for part in parts]
        yield format.dequantize_groups((*chunk, *replicated), linear.compute_dtype)


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
    return tuple(column[0] if len(column) == 1 else torch.cat(column) for column in zip(*pieces, strict=True))


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
