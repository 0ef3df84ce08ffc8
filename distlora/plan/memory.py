"""Memory of a rank on its device, by kind: what a run needs, calculated from shapes and settings. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distlora import wire
from distlora.config import Config
from distlora.plan.base import base_of, unit_bytes
from distlora.plan.kinds import KINDS, Kind, Moment
from distlora.plan.machine import Machine
from distlora.plan.model import PlannedModel
from distlora.plan.step import Step, activations_of
from distlora.plan.trained import Trained
from distlora.shapes import ModelShapes, sizes_of

__all__ = ["KINDS", "DeviceBytes", "Kind", "Moment", "activations_of", "device_bytes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceBytes:
    """Bytes of one rank, the one that has most."""

    held: Mapping[Kind, int]
    """From the first update to the end."""
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
    base = base_of(config, shapes, plain_absmax=model.plain_absmax, left_dense=model.left_dense)
    trained = Trained.of(config, shapes, base, shards)
    resident = config.parallel.resident_blocks
    count = 0 if resident == "auto" or shards == 1 else resident
    held: Counter[Kind] = Counter(base.kept(shards))
    held["norms"] += buffer_bytes(model, config)
    held["resident"] += count * unit_bytes(base.block, shards)
    held["adapters"] += trained.adapter_bytes
    held["gradients"] += trained.flat_gradient_bytes
    held["optimizer"] += trained.optimizer_bytes(config.optim.name, is_gpu=machine.is_gpu)
    held["scratch"] += arena_bytes(config, shapes) if machine.is_gpu else 0
    moments = Step.of(config, model, machine, base, trained, count).moments()
    return DeviceBytes(held={kind: n for kind, n in held.items() if n}, moments=moments, slack=0)


def buffer_bytes(model: PlannedModel, config: Config) -> int:
    """The buffers of transformers' decoder: the rotary embedding's frequencies, twice in fp32, for each kind of layer
    where kinds differ in them (Gemma 3); the scale of an embedding in its dtype (Gemma)."""
    family = model.shapes.family
    sizes = sizes_of(model.settings, family)
    ropes = sizes.get("rope_parameters") or {}
    head = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    share = ropes.get("partial_rotary_factor", sizes.get("partial_rotary_factor", 1.0))
    kinds = 2 if family.model_type.startswith("gemma3") else 1
    masters = config.adapter.method == "full"
    scale = (4 if masters else wire.DTYPE_BYTES[config.train.dtype]) if family.model_type.startswith("gemma") else 0
    return kinds * 2 * 4 * (int(head * share) // 2) + scale


def arena_bytes(config: Config, shapes: ModelShapes) -> int:
    """Scratch on a GPU: the largest weight, and with train.keep_dequantized a block's, each from a multiple of 512
    bytes on (distlora.startup.reserve_scratch)."""
    sizes = _dense_sizes(config, shapes)
    kept = sum(-(-nbytes // 512) * 512 for nbytes in sizes) if config.train.keep_dequantized else 0
    return max(sizes, default=0) + kept


def _dense_sizes(config: Config, shapes: ModelShapes) -> list[int]:
    """Bytes of each packed weight of a block, dequantized."""
    if not config.quant.is_nf4:
        return []
    return [wire.DTYPE_BYTES[config.train.dtype] * weight.numel for weight in shapes.block if weight.packs]
