"""Blocks that stay gathered (`parallel.resident_blocks`): memory that a run does not need, for bytes that it then does
not move.

They are the first ones. A step begins with the first block's gather, which nothing hides, and its backward ends with
the first blocks, whose gradients' sums nothing hides: with these at home the wire is free for the sums. With a gather
one block ahead, the last resident block asks for the first that is not, as any other does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distlora.config.parallel import RESIDENCY_RESERVE
from distlora.model.blocks import Block
from distlora.parallel import fsdp2
from distlora.parallel.shards import Shards
from distlora.planner.traffic import padded
from distlora.system import host_memory


@dataclass(slots=True)
class Residency:
    """Which blocks of a sharded model stay gathered."""

    blocks: Sequence[Block]
    shards: Shards
    device: torch.device
    count: int = 0
    """The first so many stay, from their next gather on."""
    waits: bool = False
    """Whether how many is still to be found out, by the memory that a first step leaves."""

    def keep(self, count: int) -> None:
        fsdp2.keep_gathered(self.blocks[:count])
        self.count, self.waits = count, False

    def fitting(self) -> tuple[Tensor, float]:
        """(how many blocks this rank has memory for, () int64 on the device; the bytes that are for them)."""
        usable, fitting, total = free_bytes(self.device), 0, 0
        for block in self.blocks:
            total += gathered_bytes(block, self.shards)
            fitting += total <= usable
        return torch.tensor(fitting, device=self.device), usable

    def said(self) -> str:
        """Of a number that is above 0."""
        memory = sum(gathered_bytes(block, self.shards) for block in self.blocks[: self.count])
        return (
            f"{self.count:,} of {len(self.blocks):,} blocks stay gathered, which takes {memory / 2**30:,.2f} GiB on "
            "each rank"
        )


def gathered_bytes(module: nn.Module, shards: Shards) -> int:
    """What a gathered block takes beside its shards: its frozen parameters, filled up to a multiple of the ranks."""
    whole = (parameter for parameter in module.parameters() if not parameter.requires_grad)
    return sum(padded(parameter.shape, shards.count) * parameter.element_size() for parameter in whole)


def free_bytes(device: torch.device) -> float:
    """Memory that this rank may take beyond all that it has held so far, less the reserve."""
    if device.type == "cuda":
        # What torch's allocator has once held counts as taken: a step needs it again.
        free, total = torch.cuda.mem_get_info(device)
        return free - RESIDENCY_RESERVE["cuda"] * total
    available = host_memory.available_bytes()
    if available is None:
        return 0.0
    return (1 - RESIDENCY_RESERVE["cpu"]) * available / host_memory.processes_here()
