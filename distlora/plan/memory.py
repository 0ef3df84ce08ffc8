"""Memory of a rank on its device, by kind: what a run needs, calculated from shapes and settings. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from distlora import wire
from distlora.activations import AdaptedRanks, Costs, Decoder
from distlora.config import Config
from distlora.plan.machine import Machine
from distlora.plan.model import PlannedModel

Kind = Literal[
    "codes",  # of NF4
    "scales",  # of NF4, both levels
    "weights",  # of linears that are not quantized
    "embeddings",  # embedding and head
    "norms",  # what else of the base: norms, biases, routers
    "resident",  # blocks that stay gathered
    "adapters",
    "gradients",
    "optimizer",
    "scratch",  # dequantized weights
    "gathered",  # blocks, embedding and head while they are whole, and the buffers that they come in
    "kept",  # activations from forward to backward
    "working",  # activations of what runs
    "logits",  # a chunk of them, and what the head has beside it
    "communication",  # buckets, staging
    "slack",  # of the allocator
]
KINDS: tuple[Kind, ...] = get_args(Kind)
Moment = Literal["block", "head", "head_backward", "update"]
"""When a step may be at its peak: a block in its backward, the head in its forward, the head in its backward, the
optimizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceBytes:
    """Bytes of one rank, the one that has most."""

    held: Mapping[Kind, int]
    """From before the first step to the end."""
    moments: Mapping[Moment, Mapping[Kind, int]]
    """What is there beside it, at the most."""
    slack: int

    @property
    def worst(self) -> Moment:
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def by_kind(self) -> dict[Kind, int]:
        """At the peak; kinds of which there is nothing are left out."""
        found = {kind: self.held.get(kind, 0) + self.moments[self.worst].get(kind, 0) for kind in KINDS}
        found["slack"] += self.slack
        return {kind: nbytes for kind, nbytes in found.items() if nbytes}

    @property
    def persistent(self) -> int:
        return sum(self.held.values())

    @property
    def peak(self) -> int:
        """Without the allocator's slack: what torch counts as allocated."""
        return self.persistent + sum(self.moments[self.worst].values())

    @property
    def total(self) -> int:
        return self.peak + self.slack

    def as_json(self) -> dict[str, Any]:
        """Every kind at every moment, in bytes."""
        return {
            "total": self.total,
            "peak": self.peak,
            "persistent": self.persistent,
            "slack": self.slack,
            "worst": self.worst,
            "by_kind": self.by_kind,
            "held": dict(self.held),
            "moments": {moment: dict(kinds) for moment, kinds in self.moments.items()},
        }


def device_bytes(config: Config, model: PlannedModel, machine: Machine) -> DeviceBytes:
    """Of a training run with these settings."""
    shapes, ranks = model.shapes, machine.ranks
    shards = config.shard_degree(ranks)
    itemsize = wire.DTYPE_BYTES[config.train.dtype]
    quantized = config.quant.method == "nf4"
    block = wire.block_bytes(shapes.block, shards, quantized=quantized, itemsize=itemsize)
    packed = sum(wire.packed_bytes(w.numel, shards) for w in shapes.block if w.packs) if quantized else 0
    codes = packed * 8192 // wire.GROUP_BYTES
    linears = 0 if quantized else sum(itemsize * wire.padded(w.shape, shards) for w in shapes.block if w.packs)
    matrix = itemsize * wire.padded((shapes.vocabulary, shapes.hidden), shards)
    matrices = (1 if shapes.tied else 2) * matrix
    norms = block - packed - linears
    layers = shapes.num_layers
    adapters = shapes.adapters(config.adapter)
    trained = shapes.adapted_numel(config.adapter)
    moments = {"adamw": 8, "adamw_8bit": 2, "paged_adamw": 0, "paged_adamw_8bit": 0}[config.optim.name]
    held: dict[Kind, int] = {
        "codes": layers * codes // shards,
        "scales": layers * (packed - codes) // shards,
        "weights": layers * linears // shards,
        "embeddings": matrices // shards,
        "norms": layers * norms // shards + itemsize * shapes.hidden // shards,
        "adapters": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": moments * trained,
    }
    train = config.train
    at_once = config.data.sequence_length * train.micro_batch
    accumulation = config.accumulation(ranks) if train.accumulate == "block" else 1
    costs = Costs(
        decoder=Decoder.of(model.settings, shapes.family),
        ranks=AdaptedRanks.of({a.path: a.down[0] for a in adapters[0]}),
        dtype_bytes=itemsize,
    )
    steps = costs.step(train.checkpointing, at_once=at_once, kept_tokens=accumulation * at_once, tile=train.mlp_tile)
    largest = max(math.prod(w.shape[-2:]) for w in shapes.block if w.packs) * itemsize
    alone = shards == 1
    kept = int(steps.kept)
    gathered = 0 if alone else (3 if config.parallel.prefetch else 2) * block
    return DeviceBytes(
        held={kind: nbytes for kind, nbytes in held.items() if nbytes},
        moments={
            "block": {"kept": kept, "working": int(steps.working), "gathered": gathered, "scratch": largest},
            "head": {"kept": kept, "logits": int(steps.head_forward), "gathered": 0 if alone else 2 * matrix},
            "head_backward": {"kept": kept, "logits": int(steps.head_backward)},
            "update": {},
        },
        slack=0,
    )
