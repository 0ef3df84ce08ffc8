"""Decode the quantized weights of a checkpoint, a band of rows at a time.

A value is what the reference library computes before it rounds to a dtype: fp32, or bf16 where that is exact. Rounding
it once gives the library's value bit for bit. A codec reads the parts of whole rows of a stored matrix; the last band
is kept by the reader, because consecutive ranges of a weight often lie in the same one.

bitsandbytes' NF4 is written too. Its blocks follow the flat order of a weight, whatever its rows are, and its tensors
are those of ours without the padding of the last group, so groups are read and written alone, by any number of ranks.
The cache of quantized weights and `distlora export --format bnb` write them; both are read like any checkpoint that
bitsandbytes made.
"""

from __future__ import annotations

import bisect
import itertools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from distlora.architecture.gguf_folder import GgufTensor, format_name
from distlora.architecture.low_bit_headers import LowBitTensor, Nf4Tensor, nf4_state
from distlora.architecture.safetensors_headers import Segment
from distlora.config import UserError
from distlora_kernels import reference
from distlora_kernels.format_layouts import FORMAT_LAYOUTS, TILE
from distlora_kernels.formats import FORMATS
from distlora_kernels.formats.flat import E2M1, BlockFormat, e4m3, look_up, nibbles
from distlora_kernels.formats.fp4 import MXFP4
from distlora_kernels.formats.fp8_block import in_tiles
from distlora_kernels.formats.nf4 import NF4, NF4_ABSMAX, Nf4
from distlora_kernels.reference import BLOCK, BLOCKS_PER_GROUP, GROUP, GROUP_BYTES

if TYPE_CHECKING:
    from distlora.weights.reader import Reader
    from distlora.weights.writer import Files


class MatrixRows(NamedTuple):
    """Rows [first, stop) of a stored matrix."""

    tensor: LowBitTensor
    reader: Reader
    matrix: int
    first: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.stop - self.first

    def span(self, part: str) -> tuple[int, int, int]:
        """Return (first element, rows, columns) of these rows in a part (E, rows, columns).

        A row of scales is of `block[0]` rows of weights.
        """
        height = self.tensor.block[0] if part == "scales" else 1
        rows, low = -(-self.tensor.stored_shape[-2] // height), self.first // height
        matrices = self.tensor.shape[0] if len(self.tensor.shape) == 3 else 1
        columns = self.tensor.parts[part].numel // matrices // rows
        return (self.matrix * rows + low) * columns, -(-self.stop // height) - low, columns

    def read(self, part: str) -> Tensor:
        """Return what a part has of these rows, (rows, columns)."""
        start, rows, columns = self.span(part)
        return self.reader.read([self.tensor.parts[part]], start, start + rows * columns).view(rows, columns)

    def read_columns(self, part: str) -> Tensor:
        """Return what a part has of columns [first, stop) of the matrix, which are whole blocks, (rows, columns)."""
        num_rows, width = self.tensor.stored_shape[-2:]
        start, rows, columns = self._replace(first=0, stop=num_rows).span(part)
        whole = self.tensor.parts[part]
        offset, num_bytes = (each * whole.num_bytes // whole.numel for each in (start, rows * columns))
        matrix = replace(whole, offset=whole.offset + offset, num_bytes=num_bytes, shape=(rows, columns))
        return self.reader.read_columns(matrix, self.first * columns // width, self.stop * columns // width)


class Codec(ABC):
    """Decodes the weights of one layout. E matrices of (O, I) are stored; a tensor without experts has E = 1."""

    band = 2**20
    """Weights that are decoded at once, about: 4 MiB in fp32."""
    padding: Mapping[str, int] = {}
    """Values of the format's parts past the end of a weight, where they are not zeros."""

    @abstractmethod
    def rows(self, at: MatrixRows) -> Tensor:
        """Return some rows of a stored matrix, (rows, I) fp32 or bf16."""

    def columns(self, at: MatrixRows) -> Tensor:
        """Return columns [first, stop) of a stored matrix, whole blocks, as rows (stop - first, O)."""
        raise AssertionError(f"{at.tensor.name} is transposed")

    def row_blocks(self, at: MatrixRows) -> tuple[Tensor, ...]:
        """Return the parts of all blocks of tensor.format in some rows: each (blocks, values)."""
        raise AssertionError(f"no format has blocks of {at.tensor.name}")

    def blocks(self, tensor: LowBitTensor, reader: Reader, first: int, count: int) -> tuple[Tensor, ...]:
        """Return the parts of `count` blocks of tensor.format from block `first` on, in order: each (count, values).

        Blocks follow the flat order of `tensor.stored_shape`; FP8 tiles are those of the (E * O, I) matrix.
        """
        num_rows, width = tensor.stored_shape[-2:]
        assert tensor.format is not None, f"{tensor.name} has no format"
        sizes = FORMAT_LAYOUTS[tensor.format]
        height, columns = sizes.tile or (1, sizes.block)
        across, down = -(-width // columns), -(-num_rows // height)
        row, stop = first // across, -(-(first + count) // across)
        skipped, pieces = first - row * across, []
        while row < stop:
            matrix, start = divmod(row, down)
            end = min(down, start + stop - row)
            at = MatrixRows(tensor, reader, matrix, start * height, min(end * height, num_rows))
            pieces.append(self.row_blocks(at))
            row += end - start
        return tuple(torch.cat(column)[skipped : skipped + count] for column in zip(*pieces, strict=True))

    def replicated(self, tensor: LowBitTensor, reader: Reader) -> tuple[Tensor, ...]:
        """Return the replicated parts of tensor.format. Raises UserError if its codes have another meaning there."""
        return ()

    def bands(self, tensor: LowBitTensor, reader: Reader, start: int, stop: int) -> Iterator[Tensor]:
        """Yield the flat weights [start, stop) of the logical layout in pieces, fp32 or bf16; a vector is a column."""
        *_, num_rows, width = (*tensor.shape, 1) if len(tensor.shape) == 1 else tensor.shape
        unit = tensor.block[1] if tensor.transposed else 1
        step = min(max(self.band // width // unit, 1) * unit, num_rows)
        while start < stop:
            row, matrix = start // width % num_rows, start // width // num_rows
            first = row // step * step
            band = self._band(MatrixRows(tensor, reader, matrix, first, min(first + step, num_rows)))
            before = (matrix * num_rows + first) * width
            end = min(stop, before + band.numel())
            yield band[start - before : end - before]
            start = end

    def _band(self, at: MatrixRows) -> Tensor:
        key, kept = (at.tensor, at.matrix, at.first), at.reader.last_band
        if kept is not None and kept[0] == key:
            return kept[1]
        at.reader.last_band = None  # Two at once would double the memory.
        band = (self.columns(at) if at.tensor.transposed else self.rows(at)).flatten()
        at.reader.last_band = (key, band)
        return band


def powers_of_two(exponents: Tensor) -> Tensor:
    """Return 2 ** (e - 127) in fp32 of exponents in uint8 or ue8m0; the largest is infinite."""
    return torch.ldexp(torch.ones(exponents.shape), exponents.view(torch.uint8).int() - 127)


class ScaledCodec(Codec):
    """FP8 (e4m3) or 8-bit integers, with a scale per block of rows and columns: code * scale in fp32.

    transformers' Fp8Dequantize; compressed-tensors' float-quantized and int-quantized; ModelOpt's FP8.
    """

    def rows(self, at: MatrixRows) -> Tensor:
        """Return rows of a stored matrix."""
        columns = at.tensor.block[1]
        values, scales = at.read("codes").float(), self._scales(at)
        whole = values.shape[1] // columns
        values[:, : whole * columns].unflatten(1, (whole, columns)).mul_(scales[:, :whole, None])
        values[:, whole * columns :].mul_(scales[:, whole:])
        return values

    @staticmethod
    def _scales(at: MatrixRows) -> Tensor:
        """Return the scales of each row."""
        stored, height = at.read("scales"), at.tensor.block[0]
        scales = powers_of_two(stored) if stored.itemsize == 1 else stored.float()
        return scales[torch.arange(at.first, at.stop).div(height, rounding_mode="floor") - at.first // height]

    def row_blocks(self, at: MatrixRows) -> tuple[Tensor, ...]:
        """Return (codes (n, 16384) uint8, scales (n, 1) fp32) of tiles of 128 x 128, zeros past the edges."""
        of_tiles = torch.arange(0, at.tensor.stored_shape[-1], TILE).div(at.tensor.block[1], rounding_mode="floor")
        return in_tiles(at.read("codes").view(torch.uint8)), self._scales(at)[::TILE, of_tiles].reshape(-1, 1)


class BnbInt8Codec(Codec):
    """bitsandbytes' 8-bit rows (functional.int8_vectorwise_dequant): code * absmax * (1 / 127) in fp32."""

    def rows(self, at: MatrixRows) -> Tensor:
        """Return rows of a stored matrix."""
        layout = at.tensor.parts.get("layout")
        if layout is not None and int(at.reader.read([layout], 0, 1)):
            raise UserError(
                f"{layout.file}: {at.tensor.name} is in a layout for old GPUs (weight_format), not in rows; save it "
                "again with a current bitsandbytes"
            )
        return at.read("codes").float().mul_(at.read("scales")).mul_(7.874015718698502e-3)


class Fp4Codec(Codec):
    """MXFP4 (exponents per 32) or NVFP4 (e4m3 scales per 16, over a global scale): two e2m1 per byte, low nibble first.

    transformers' convert_moe_packed_tensors; compressed-tensors' mxfp4- and nvfp4-pack-quantized. MXFP4 is exact in
    bf16; NVFP4 is code * (scale / global scale) in fp32. `reciprocal`: ModelOpt's NVFP4, code * (scale * scale_2) in
    fp32 (NVFP4QTensor.dequantize). Its blocks have 1 / scale_2 as their global scale, so that what quant=keep computes
    differs from these values by up to 5 units of rounding (2^-24) of fp32.
    """

    def __init__(self, format: BlockFormat, *, reciprocal: bool = False) -> None:
        self.format, self.reciprocal = format, reciprocal

    def rows(self, at: MatrixRows) -> Tensor:
        """Return rows of a stored matrix."""
        if self.reciprocal:
            codes, scales, scale_2 = self._parts(at)
            scale = look_up(e4m3(scales.device), scales).mul_(scale_2)
            values = nibbles(codes, E2M1).view(*scale.shape, -1)
            return values.mul_(scale[..., None]).flatten(1)
        values = self.format.decode(*self.row_blocks(at)).view(at.num_rows, -1)
        return values.bfloat16() if self.format is MXFP4 else values

    def columns(self, at: MatrixRows) -> Tensor:
        """Return columns of a stored matrix as rows."""
        assert self.format is MXFP4, "gpt-oss alone is transposed"
        codes, scales = at.read_columns("codes"), at.read_columns("scales")
        values = self.format.decode(codes.reshape(-1, MXFP4.block // 2), scales.reshape(-1, 1))
        return values.bfloat16().view(len(codes), -1).T.contiguous()

    def _parts(self, at: MatrixRows) -> tuple[Tensor, ...]:
        codes, scales, global_scale = at.read("codes"), at.read("scales"), at.tensor.parts.get("global_scale")
        more = [] if global_scale is None else [at.reader.read([global_scale], 0, 1)]
        return codes, scales.view(torch.uint8), *more

    def row_blocks(self, at: MatrixRows) -> tuple[Tensor, ...]:
        """Return (codes (n, 16 or 8) uint8, scales (n, 1) uint8), with NVFP4 the global scale (n, 1) fp32."""
        codes, scales, *more = self._parts(at)
        scales = scales.reshape(-1, 1)
        divisor = [1 / each if self.reciprocal else each for each in more]
        return codes.reshape(len(scales), -1), scales, *(each.expand(len(scales), 1) for each in divisor)


class IntegerCodec(Codec):
    """Integers of 4 or 8 bits with a zero point and a scale per group of a row: (code - zero) * scale in fp32."""

    @abstractmethod
    def integers(self, at: MatrixRows) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes (n, I) and zeros (n, G), both uint8 as stored, and scales (n, G) of some rows."""

    def rows(self, at: MatrixRows) -> Tensor:
        """Return rows of a stored matrix."""
        codes, zeros, scales = self.integers(at)
        groups = self._groups(at.tensor, at.reader)
        return (codes.float() - zeros.float()[:, groups]).mul_(scales.float()[:, groups])

    @staticmethod
    def _groups(tensor: LowBitTensor, reader: Reader) -> Tensor:
        """Return the group of each column. Raises UserError for an order with groups that do not exist."""
        width, size = tensor.shape[-1], tensor.block[1]
        if "order" not in tensor.parts:
            return torch.arange(width).div(size, rounding_mode="floor")
        order = tensor.parts["order"]
        groups = reader.read([order], 0, width).long()
        if int(groups.min()) < 0 or int(groups.max()) >= -(-width // size):
            raise UserError(
                f"{order.file}: the order of the columns of {tensor.name} (g_idx) names groups {int(groups.min())} to "
                f"{int(groups.max())} of {-(-width // size)}; the checkpoint is damaged, download it again"
            )
        return groups

    def row_blocks(self, at: MatrixRows) -> tuple[Tensor, ...]:
        """Return (codes (n, N / 2) uint8, low nibble first, scales (n, 1) as stored), and stored zeros (n, 1) uint8."""
        (codes, zeros, scales), tensor = self.integers(at), at.tensor
        assert tensor.format is not None, f"{tensor.name} has no format"
        size = FORMAT_LAYOUTS[tensor.format].block
        groups = self._groups(tensor, at.reader)
        if not bool((groups.view(-1, size) == groups[::size, None]).all()):
            raise UserError(
                f"{tensor.parts['order'].file}: {tensor.name} has its columns in activation order (g_idx), but "
                "config.json has desc_act=false; set {quant.method}=nf4 to quantize it again"
            )
        blocks = codes.reshape(-1, size)
        parts = (scales, zeros) if "zeros" in tensor.parts else (scales,)
        of_block = (part[:, groups[::size]].reshape(-1, 1) for part in parts)
        return blocks[:, ::2] | blocks[:, 1::2] << 4, *of_block


def unpacked(words: Tensor, bits: int, *, interleaved: bool = False) -> Tensor:
    """Return the integers in each int32, lowest bits first: (n, m) -> (n, m * 32 / bits) uint8.

    `interleaved`: AWQ's order, in which the eight 4-bit integers of a word lie at 0, 4, 1, 5, 2, 6, 3, 7.
    """
    codes = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1)
    if interleaved:
        codes = codes.view(len(words), -1, 2, 2, 2).permute(0, 1, 3, 4, 2)
    return codes.reshape(len(words), -1)


class PackedCodec(IntegerCodec):
    """compressed-tensors' pack-quantized: words along the rows; zero points packed along the columns of (O, G)."""

    def integers(self, at: MatrixRows) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, zeros and scales of some rows."""
        tensor, reader, matrix, first, stop = at
        shape, bits = tensor.parts["shape"], tensor.bits
        stored = reader.read([shape], 0, shape.numel).tolist()
        if stored != list(tensor.shape):
            raise UserError(
                f"{shape.file}: weight_shape of {tensor.name} is {stored}, and its codes are of {list(tensor.shape)}; "
                "the checkpoint is damaged, download it again"
            )
        codes, scales = unpacked(at.read("codes"), bits)[:, : tensor.shape[-1]], at.read("scales")
        if "zeros" not in tensor.parts:
            return codes, torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8), scales
        per_word, num_groups = 32 // bits, scales.shape[1]
        words = -(-tensor.shape[-2] // per_word)
        low, high = matrix * words + first // per_word, matrix * words - (-stop // per_word)
        zeros = reader.read([tensor.parts["zeros"]], low * num_groups, high * num_groups).view(-1, num_groups)
        return codes, unpacked(zeros.T, bits).T[first % per_word :][: at.num_rows], scales


class GptqCodec(IntegerCodec):
    """GPTQ's columns: words along I in codes (I * bits / 32, O), along O in zeros (G, O * bits / 32).

    The first version of the format stores zero points less 1. There 15 (of 8 bits 255) is 16 in some libraries and 0
    in others, and is refused.
    """

    def __init__(self, *, first_version: bool) -> None:
        self.first_version = first_version

    def integers(self, at: MatrixRows) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, zeros and scales of some rows."""
        tensor, reader, _, first, stop = at
        per_word = 32 // tensor.bits
        codes = unpacked(reader.read_columns(tensor.parts["codes"], first, stop).T, tensor.bits)
        words = reader.read_columns(tensor.parts["zeros"], first // per_word, -(-stop // per_word))
        zeros = unpacked(words, tensor.bits).T[first % per_word :][: at.num_rows]
        if self.first_version:
            if bool((zeros == (1 << tensor.bits) - 1).any()):
                raise UserError(
                    f"{tensor.parts['zeros'].file}: {tensor.name} has a zero point stored as {(1 << tensor.bits) - 1}, "
                    f"which libraries read as {1 << tensor.bits} or 0; quantize the model again in gptq_v2"
                )
            zeros = zeros + 1
        return codes, zeros, reader.read_columns(tensor.parts["scales"], first, stop).T


class AwqCodec(IntegerCodec):
    """AutoAWQ's columns (gemm): words along O in codes (I, O / 8) and zeros (G, O / 8), eight columns interleaved."""

    def integers(self, at: MatrixRows) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, zeros and scales of some rows."""
        tensor, reader, _, first, stop = at
        words = (reader.read_columns(tensor.parts[part], first // 8, -(-stop // 8)) for part in ("codes", "zeros"))
        codes, zeros = (unpacked(each, 4, interleaved=True).T[first % 8 :][: at.num_rows] for each in words)
        return codes.contiguous(), zeros, reader.read_columns(tensor.parts["scales"], first, stop).T


MAP_ULPS = 4
"""Tolerance for a stored 8-bit map, in ulps: bitsandbytes recomputes it on each machine, and torch.linspace's last bits
depend on the processor (2 ulps seen).
"""


PADDING = {"codes": reference.ZERO_CODE * 17, "scales": reference.ZERO_SCALE}
"""Codes of 0, in both nibbles, and the index of 0 in the 8-bit map."""


class Nf4Codec(Codec):
    """level * absmax in fp32, with the absmax stored or double-quantized (functional.dequantize_4bit)."""

    def rows(self, at: MatrixRows) -> Tensor:
        """Return rows of the weight."""
        rows, width = at.tensor.shape[-2:]
        start, end = ((at.matrix * rows + row) * width for row in (at.first, at.stop))
        low, high = start // GROUP, reference.num_groups(end)
        parts = (*read_groups(at.tensor, at.reader, low, high), *self.replicated(at.tensor, at.reader))
        flat = _format(at.tensor).dequantize(parts, shape=((high - low) * GROUP,), dtype=torch.float32)
        return flat[start - low * GROUP : end - low * GROUP].view(at.num_rows, -1)

    def replicated(self, tensor: LowBitTensor, reader: Reader) -> tuple[Tensor, ...]:
        """Return the offset with double quantization. Raises UserError for other maps than distlora's."""
        assert isinstance(tensor, Nf4Tensor)
        if tensor.parts["quant_map"] not in reader.checked:  # Once per tensor, not for each band of its rows.
            _check_maps(tensor, reader)
            reader.checked.add(tensor.parts["quant_map"])
        return () if tensor.offset is None else (torch.tensor(tensor.offset, dtype=torch.float32),)


def _check_maps(tensor: Nf4Tensor, reader: Reader) -> None:
    """Raise UserError for other maps than distlora's."""
    levels = reader.read([tensor.parts["quant_map"]], 0, 16)
    if not torch.equal(levels, torch.tensor(reference.NF4_LEVELS)):
        raise UserError(
            f"{tensor.name}.quant_map holds {levels.tolist()}, which are not NF4's levels; set {{model.path}} to "
            "the 16-bit checkpoint"
        )
    if tensor.offset is None:
        return
    entries, ours = reader.read([tensor.parts["nested_quant_map"]], 0, 256), reference.dynamic_map()
    if not bool(((entries - ours).abs() <= MAP_ULPS * torch.finfo(ours.dtype).eps * ours.abs()).all()):
        worst = int((entries - ours).abs().nan_to_num(torch.inf).argmax())
        raise UserError(
            f"{tensor.name}.nested_quant_map is not bitsandbytes' dynamic map (entry {worst} is "
            f"{entries[worst]:.7g}, not {ours[worst]:.7g}); set {{model.path}} to the 16-bit checkpoint"
        )


def _format(tensor: LowBitTensor) -> Nf4:
    return NF4 if "group_scale" in tensor.parts else NF4_ABSMAX


def read_groups(tensor: LowBitTensor, reader: Reader, first: int, stop: int) -> list[Tensor]:
    """Return the parts of groups [first, stop) of the weight, padded to whole groups: each (groups, ...)."""
    groups = []
    for part in _format(tensor).parts:
        stored, size = tensor.parts[part.name], math.prod(part.shape)
        values = reader.read([stored], first * size, min(stop * size, stored.numel))
        missing = (stop - first) * size - len(values)
        values = torch.nn.functional.pad(values, (0, missing), value=PADDING.get(part.name, 0))
        groups.append(values.view(stop - first, *part.shape))
    return groups


def write_groups(files: Files, name: str, shape: Sequence[int], first: int, parts: Sequence[Tensor]) -> None:
    """Write codes (g, 8192), scales (g, 256) and group_scale (g,) of groups `first` onwards, those that are given.

    `files` is laid out by `nf4_tensors`.
    """
    numel = math.prod(shape)
    written = (
        (name, GROUP_BYTES, -(-numel // 2)),
        (f"{name}.absmax", BLOCKS_PER_GROUP, -(-numel // BLOCK)),
        (f"{name}.nested_absmax", 1, reference.num_groups(numel)),
    )
    for values, (tensor, size, stop) in zip(parts, written, strict=False):
        files.write(tensor, first * size, values.reshape(-1)[: stop - first * size])


def write_statistics(files: Files, name: str, shape: Sequence[int], offset: Tensor, dtype: str) -> None:
    """Write what all groups share: both maps, and the quant_state with the offset. `dtype`: `nf4_state`."""
    files.write(f"{name}.quant_map", 0, torch.tensor(reference.NF4_LEVELS, dtype=torch.float32))
    files.write(f"{name}.nested_quant_map", 0, reference.dynamic_map())
    state, text = nf4_state(name, shape, float(offset), dtype)
    files.write(state, 0, torch.frombuffer(bytearray(text), dtype=torch.uint8))


DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufCodec(Codec):
    """ggml's blocks, row by row, in fp32: the values of gguf.quants.dequantize."""

    def rows(self, at: MatrixRows) -> Tensor:
        """Return rows of a stored matrix."""
        before = at.matrix * at.tensor.shape[-2] if at.matrix else 0
        return self._decoded(at.tensor, at.reader, before + at.first, before + at.stop).view(at.num_rows, -1)

    def blocks(self, tensor: LowBitTensor, reader: Reader, first: int, count: int) -> tuple[Tensor, ...]:
        """Return the bytes of blocks."""
        assert isinstance(tensor, GgufTensor)
        _, weights, num_bytes = tensor.types[0]
        per_row = tensor.width // weights
        row, stop = first // per_row, -(-(first + count) // per_row)
        ((_, content),) = _stored_rows(tensor, reader, row, stop)
        return (content.view(-1, num_bytes)[first - row * per_row :][:count],)

    def _decoded(self, tensor: LowBitTensor, reader: Reader, first: int, stop: int) -> Tensor:
        assert isinstance(tensor, GgufTensor)
        values = torch.cat([decode(kind, content) for kind, content in _stored_rows(tensor, reader, first, stop)])
        return values.sub_(1) if tensor.minus_one else values


def _stored_rows(tensor: GgufTensor, reader: Reader, first: int, stop: int) -> list[tuple[str, Tensor]]:
    """Return the bytes of the parameter's rows [first, stop), by (type, bytes) of neighbours of one type."""
    pieces = list[tuple[str, Segment]]()
    for run in range(bisect.bisect_right(tensor.runs, (first, sys.maxsize)) - 1, len(tensor.runs)):
        row, start, count = tensor.runs[run]
        if row >= stop:
            break
        low, high = start + max(first - row, 0), start + min(stop - row, count)
        for (kind, weights, block_bytes), part in zip(tensor.types, tensor.parts.values(), strict=True):
            row_bytes = tensor.width // weights * block_bytes
            begin, end = max(low, 0), min(high, part.num_bytes // row_bytes)
            if begin < end:
                size = (end - begin) * row_bytes
                pieces.append((kind, Segment(part.file, part.offset + begin * row_bytes, size, "U8", (size,))))
            low, high = (bound - part.num_bytes // row_bytes for bound in (low, high))
    runs = []
    for kind, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
        segments = [segment for _, segment in group]
        runs.append((kind, reader.read(segments, 0, sum(segment.num_bytes for segment in segments))))
    return runs


def decode(kind: str, content: Tensor) -> Tensor:
    """Return the flat weights of bytes of whole blocks, in fp32."""
    if kind in DENSE:
        return content.view(DENSE[kind]).float()
    format = FORMATS.get(format_name(kind))
    if format is not None:
        (part,), length = format.parts, len(content)
        groups = content.new_zeros(-(-length // part.nbytes), part.nbytes)
        groups.view(-1)[:length] = content
        shape = (length * GROUP // part.nbytes,)
        return format.dequantize((groups,), shape=shape, dtype=torch.float32)
    import gguf  # The types that no format of the kernels holds.

    return torch.from_numpy(gguf.quants.dequantize(content.numpy(), gguf.GGMLQuantizationType[kind]).copy())
