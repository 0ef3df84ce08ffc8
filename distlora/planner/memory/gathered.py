"""Calculate the base's units that are whole on a rank, with their buffers, by the part of a step. Imports no torch.

FSDP2 (torch 2.13, _fsdp_param_group.py). A gather has an output of all ranks' rows, of which each parameter is then
copied out: a unit takes its bytes twice until the output is let go, which in forward is when the next unit is copied
out, or when the root is done, and in backward at once. A gather ahead has an output too. So with prefetch a block in
forward has three blocks' bytes there: its own, the output that it came in, the next one's output; in backward two, with
prefetch or without, as FSDP2 then looks ahead by itself.

One process gathers nothing, and computes with 16-bit copies of what it trains of the base
(distlora/parallel/mixed_precision.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from distlora.config.deepspeed_file import read_gathering
from distlora.planner.memory.base import Base, Gathered, Stored, unit_bytes
from distlora.planner.memory.zero3 import coordinated
from distlora.planner.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Copied:
    """Bytes of 16-bit copies of trained masters in one process."""

    embedding: int = 0
    block: int = 0
    """Of one block while it runs, and in its backward."""
    kept: int = 0
    """Of all blocks from forward to backward, where nothing is recomputed."""
    head: int = 0
    """From its forward to its backward."""


def gathered_of(work: Workload, base: Base, shards: int, resident: int, *, is_gpu: bool) -> Gathered:
    """Return the gathered bytes of a base sharded over `shards` ranks, with `resident` blocks that stay gathered."""
    if shards == 1:
        return Gathered()
    if work.parallel.backend == "zero3":
        return coordinated(base, shards, read_gathering(work.parallel), is_gpu=is_gpu)
    parts = (base.embedding, base.block, base.head, base.rest)
    embedding, block, head, rest = (unit_bytes(part, shards) for part in parts)
    moved = base.layers - resident
    whole = embedding if base.tied else 0
    # The output of the last unit that was copied out: of the embedding, where all blocks stay.
    in_use, output = (block, block) if moved else (0, embedding)
    another = block if moved > 1 else 0
    ahead = another if work.parallel.prefetch else 0
    trains_head = any(tensor.trained for tensor in base.head or base.embedding)
    # A tied unit that is trained is gathered again for the head's backward, and stays until the embedding's.
    behind = rest + (whole if trains_head else 0)
    return Gathered(
        copying=rest + whole + head + output,
        # The output that a tied unit came in is there until the first block is copied out.
        embedding=rest + 2 * embedding + (in_use if base.tied else 0),
        forward=rest + whole + in_use + output + ahead,
        last=rest + whole + in_use + output,
        head=rest + (whole + output if base.tied else 2 * head),
        head_backward=behind + in_use + (head if trains_head else 0),
        block=behind + in_use + another,
        # Where the first blocks stay, the first one is none that moves.
        first=behind + (in_use if resident == 0 else 0),
    )


def copied_of(work: Workload, base: Base, shards: int) -> Copied:
    """Return the bytes of 16-bit copies of trained masters; only one process has any."""
    if shards > 1:
        return Copied()
    embedding, block, head = (_copies(unit) for unit in (base.embedding, base.block, base.head or base.embedding))
    keeps = work.checkpointing == "none"
    return Copied(
        embedding=embedding,
        block=0 if keeps else block,
        kept=base.layers * block if keeps else 0,
        head=head,
    )


def _copies(unit: Iterable[Stored]) -> int:
    return sum(tensor.compute_itemsize * tensor.numel for tensor in unit if tensor.itemsize != tensor.compute_itemsize)
