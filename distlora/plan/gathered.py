"""What is whole on a rank while a unit of the base is in use, at each moment of a step, and the buffers that it comes
in. Imports no torch.

FSDP2 (torch 2.13, _fsdp_param_group.py). A gather has an output of all ranks' rows, of which each parameter is then
copied out: a unit takes its bytes twice until the output is let go, which in forward is when the next unit is copied
out, or when the root is done, and in backward at once. A gather ahead has an output too. So with prefetch a block in
forward has three blocks' bytes there: its own, the output that it came in, the next one's output; in backward two, with
prefetch or without, as FSDP2 then looks ahead by itself. A unit whose gradients are summed has what it puts into the
reduce-scatter in fp32 until the next unit's backward is done.

ZeRO-3 (DeepSpeed 0.19.8, partition_parameters.py; distlora/parallel/zero3.py). A unit of several tensors comes in one
flat buffer and is copied out of it before that is let go, one of a single tensor comes in place. The next block's
buffer is filled meanwhile. On a GPU the host is up to two units ahead, so what was let go may still be taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distlora.config import Config
from distlora.deepspeed_file import Gathering, read_gathering
from distlora.plan.base import Base, unit_bytes
from distlora.plan.kinds import Moment


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """Bytes of the units while they are whole."""

    embedding: int
    """With the head, where they are tied."""
    block: int
    head: int
    """0 where it is the embedding's."""
    rest: int
    moved: int
    """Blocks that are gathered: those that do not stay."""

    @classmethod
    def of(cls, base: Base, shards: int, resident: int) -> Units:
        parts = (base.embedding, base.block, base.head, base.rest)
        embedding, block, head, rest = (unit_bytes(part, shards) for part in parts)
        return cls(embedding=embedding, block=block, head=head, rest=rest, moved=base.layers - resident)

    @property
    def tied(self) -> bool:
        return self.head == 0


def gathered_bytes(config: Config, base: Base, shards: int, resident: int, *, is_gpu: bool) -> Mapping[Moment, int]:
    """At each moment; empty where nothing is cut, and so nothing gathered."""
    if shards == 1:
        return copied_bytes(config, base)
    units = Units.of(base, shards, resident)
    if config.parallel.backend == "zero3":
        return _zero3(units, read_gathering(config.parallel), is_gpu=is_gpu)
    return _fsdp2(units, base, prefetch=config.parallel.prefetch)


def copied_bytes(config: Config, base: Base) -> Mapping[Moment, int]:
    """One process that computes with 16-bit copies of trained masters has those of the module that runs, a block's in
    its backward too, and a head's from forward to backward (distlora/parallel/compute_copies.py); without checkpointing
    those of all blocks."""

    def copies(*units: int) -> int:
        return sum(units)

    embedding, block, head, rest = (
        sum(t.whole(1) for t in unit if t.itemsize != t.compute_itemsize)
        for unit in (base.embedding, base.block, base.head or base.embedding, base.rest)
    )
    if not embedding + block + head:
        return {}
    kept = base.layers * block if config.train.checkpointing == "none" else 0
    return {
        "embedding": embedding,
        "forward": kept or block,
        "head": kept + rest + head,
        "head_backward": kept + head,
        "block": kept or block,
        "evaluation": max(block, head),
    }


def _fsdp2(units: Units, base: Base, *, prefetch: bool) -> Mapping[Moment, int]:
    block = units.block if units.moved else 0
    ahead = units.block if prefetch and units.moved > 1 else 0
    whole = units.embedding if units.tied else 0
    forward = units.rest + whole + 2 * block + ahead
    # The output that a tied unit came in is there until the first block is copied out.
    embedding = units.rest + 2 * units.embedding + (block if units.tied else 0)
    last = units.rest + (whole + block if units.tied else max(2 * units.head, units.head + block))
    head_is_trained = any(tensor.trained for tensor in base.head or base.embedding)
    head_backward = units.rest + block + ((whole or units.head) if head_is_trained else 0)
    behind = units.block if units.moved > 1 else 0
    return {
        "embedding": embedding,
        "forward": forward,
        "head": last,
        "head_backward": head_backward,
        "block": units.rest + block + behind + (whole if head_is_trained else 0),
        "evaluation": max(embedding, forward, last),
    }


def _zero3(units: Units, gathering: Gathering, *, is_gpu: bool) -> Mapping[Moment, int]:
    ahead = units.block if gathering.prefetch_bucket_size != 0 and units.moved > 1 else 0
    matrix = units.head or units.embedding
    # What a unit is copied out of, or on a GPU the unit before, which the device has not passed yet.
    late = units.block if is_gpu else 0
    block = units.rest + max(2 * units.block, units.block + ahead) + late
    head = units.rest + matrix + ahead + late
    return {
        "embedding": units.rest + units.embedding + ahead,
        "forward": max(block, units.rest + units.block + matrix),
        "head": head,
        "head_backward": units.rest + ahead + late,
        "block": block,
        "evaluation": max(block, head),
    }
