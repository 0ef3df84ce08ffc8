"""Read and write bitsandbytes' NF4, whose blocks follow the flat order of a weight, whatever its rows are.

The tensors are those of ours without the padding of the last group, so groups are read and written alone, by any
number of ranks. The cache of quantized weights and `distlora export --format bnb` write them; both are read like any
checkpoint that bitsandbytes made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distlora.architecture.low_bit_bnb import nf4_state
from distlora.architecture.low_bit_headers import LowBitTensor, Nf4Tensor
from distlora.config import UserError
from distlora.weights.low_bit.codecs import Codec, MatrixRows
from distlora_kernels import reference
from distlora_kernels.formats.nf4 import NF4, NF4_ABSMAX, Nf4
from distlora_kernels.reference import BLOCK, BLOCKS_PER_GROUP, GROUP, GROUP_BYTES

if TYPE_CHECKING:
    from distlora.weights.reader import Reader
    from distlora.weights.writer import Files

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
    for part, (tensor, size, stop) in zip(parts, written, strict=False):
        files.write(tensor, first * size, part.reshape(-1)[: stop - first * size])


def write_statistics(files: Files, name: str, shape: Sequence[int], offset: Tensor, dtype: str) -> None:
    """Write what all groups share: both maps, and the quant_state with the offset. `dtype`: `nf4_state`."""
    files.write(f"{name}.quant_map", 0, torch.tensor(reference.NF4_LEVELS, dtype=torch.float32))
    files.write(f"{name}.nested_quant_map", 0, reference.dynamic_map())
    state, text = nf4_state(name, shape, float(offset), dtype)
    files.write(state, 0, torch.frombuffer(bytearray(text), dtype=torch.uint8))
