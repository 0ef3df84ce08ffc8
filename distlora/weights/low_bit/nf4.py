"""Decode bitsandbytes' NF4, whose blocks follow the flat order of a weight, whatever its rows are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distlora.architecture.low_bit_headers import LowBitTensor, Nf4Tensor
from distlora.config import UserError
from distlora.weights.low_bit.codecs import Codec, MatrixRows
from distlora_kernels import reference
from distlora_kernels.formats.nf4 import NF4, NF4_ABSMAX, Nf4
from distlora_kernels.reference import BLOCKS_PER_GROUP, GROUP

if TYPE_CHECKING:
    from distlora.weights.reader import Reader

MAP_ULPS = 4
"""Tolerance for a stored 8-bit map, in ulps: bitsandbytes recomputes it on each machine, and torch.linspace's last bits
depend on the processor (2 ulps seen).
"""


PADDING = {"codes": reference.ZERO_CODE * 17, "scales": reference.ZERO_SCALE}
"""Codes of 0, in both nibbles, and the index of 0 in the 8-bit map."""


class Nf4Codec(Codec):
    """level * absmax in fp32, with the absmax stored or double-quantized (functional.dequantize_4bit)."""

    padding = PADDING

    def rows(self, at: MatrixRows) -> Tensor:
        """Return rows of the weight."""
        start, end = (row * at.tensor.shape[-1] for row in (at.first, at.stop))
        low, high = start // GROUP, reference.num_groups(end)
        parts = (*_groups(at.tensor, at.reader, low, high), *self.replicated(at.tensor, at.reader))
        flat = _format(at.tensor).dequantize(parts, shape=((high - low) * GROUP,), dtype=torch.float32)
        return flat[start - low * GROUP : end - low * GROUP].view(at.num_rows, -1)

    def blocks(self, tensor: LowBitTensor, reader: Reader, first: int, count: int) -> tuple[Tensor, ...]:
        """Return codes (n, 32), and scales and group_scale or absmax (n, 1) of blocks of 64."""
        low = first // BLOCKS_PER_GROUP
        parts = _groups(tensor, reader, low, -(-(first + count) // BLOCKS_PER_GROUP))
        of_blocks = (part.repeat_interleave(BLOCKS_PER_GROUP)[:, None] if part.dim() == 1 else part for part in parts)
        skipped, total = first - low * BLOCKS_PER_GROUP, len(parts[0]) * BLOCKS_PER_GROUP
        return tuple(part.reshape(total, -1)[skipped : skipped + count] for part in of_blocks)

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


def _groups(tensor: LowBitTensor, reader: Reader, first: int, stop: int) -> list[Tensor]:
    """Return the parts of groups [first, stop) of the weight, padded to whole groups."""
    groups = []
    for part in _format(tensor).parts:
        stored, size = tensor.parts[part.name], math.prod(part.shape)
        values = reader.read([stored], first * size, min(stop * size, stored.numel))
        missing = (stop - first) * size - len(values)
        values = torch.nn.functional.pad(values, (0, missing), value=PADDING.get(part.name, 0))
        groups.append(values.view(stop - first, *part.shape))
    return groups
