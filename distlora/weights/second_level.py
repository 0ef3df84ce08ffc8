"""The second level of a tensor's double quantization from a stream of its weights: chunks go by, their absmax stay.

What is in memory beside one chunk is an absmax for every 64 weights, whatever the tensor's size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distlora_kernels import nf4


@dataclass(frozen=True, slots=True)
class SecondLevel:
    """The absmax of a tensor in 8 bits, which both formats have alike. G groups."""

    scales: Tensor
    """(G, 256) uint8."""
    group_scale: Tensor
    """(G,) fp32."""
    offset: Tensor
    """() fp32."""

    @classmethod
    def of(cls, chunks: Iterable[Tensor], numel: int) -> SecondLevel:
        """From flat chunks that are `numel` weights together, each of whole groups but the last.

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
        """(scales, group_scale, offset) of some groups."""
        return self.scales[first : first + count], self.group_scale[first : first + count], self.offset


def _absmax(chunk: Tensor) -> Tensor:
    """(n,) -> (G, 256) fp32: the largest magnitude of each block of 64, 0 in the padding."""
    padded = torch.zeros(nf4.num_groups(chunk.numel()) * nf4.GROUP, dtype=torch.float32, device=chunk.device)
    padded[: chunk.numel()] = chunk
    return padded.view(-1, nf4.BLOCK).abs().amax(dim=1).view(-1, nf4.BLOCKS_PER_GROUP)
