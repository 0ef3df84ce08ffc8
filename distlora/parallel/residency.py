"""Keep decoder layers gathered (`parallel.resident_blocks`): free memory is traded for network traffic.

The first layers stay. A step begins with the first layer's all-gather, which nothing hides, and backward ends with the
first layers, whose gradient reductions nothing hides. Without those gathers the network is free for the reductions.
Gathers run one layer ahead, and the last resident layer starts that of the first non-resident one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distlora.config.cluster import RESIDENCY_RESERVE
from distlora.model.layer_wrapper import Block
from distlora.parallel import fsdp2
from distlora.parallel.shards import Shards
from distlora.planner.traffic import padded
from distlora.system import host_memory


@dataclass(slots=True)
class Residency:
    """Decoder layers of a sharded model that stay gathered."""

    blocks: Sequence[Block]
    shards: Shards
    device: torch.device
    count: int = 0
    """Number of layers that stay, counted from the first, from their next gather on."""
    waits: bool = False
    """True until the number has been chosen from the memory that the first step leaves."""

    def keep(self, count: int) -> None:
        """Keep the first `count` layers gathered."""
        fsdp2.keep_gathered(self.blocks[:count])
        self.count, self.waits = count, False

    def fitting(self) -> tuple[Tensor, float]:
        """Return (layers that this rank has memory for, () int64 on the device; bytes available for them)."""
        usable, fitting, total = free_bytes(self.device), 0, 0
        for block in self.blocks:
            total += gathered_bytes(block, self.shards)
            fitting += total <= usable
        return torch.tensor(fitting, device=self.device), usable

    def describe(self) -> str:
        """Describe the resident layers in a line, for a count above 0."""
        memory = sum(gathered_bytes(block, self.shards) for block in self.blocks[: self.count])
        return (
            f"{self.count:,} of {len(self.blocks):,} layers stay gathered, which takes {memory / 2**30:,.2f} GiB on "
            "each rank"
        )


def gathered_bytes(module: nn.Module, shards: Shards) -> int:
    """Return the bytes that a gathered layer adds: its frozen parameters, padded to a multiple of the ranks."""
    whole = (parameter for parameter in module.parameters() if not parameter.requires_grad)
    return sum(padded(parameter.shape, shards.count) * parameter.element_size() for parameter in whole)


def free_bytes(device: torch.device) -> float:
    """Return the bytes that this rank can still allocate beyond its peak so far, less the reserve."""
    if device.type == "cuda":
        # Memory that torch's allocator has once held counts as used, because a step needs it again.
        free, total = torch.cuda.mem_get_info(device)
        return free - RESIDENCY_RESERVE["cuda"] * total
    available = host_memory.available_bytes()
    if available is None:
        return 0.0
    return (1 - RESIDENCY_RESERVE["cpu"]) * available / host_memory.processes_here()
