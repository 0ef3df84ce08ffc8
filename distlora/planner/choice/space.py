"""The settings that a plan may choose, the values that each may have, and those that go together. Imports no torch.

None of them but quant.method changes what a run learns, beyond the order of sums: so `plan=auto` is free to set them,
while quant.method is chosen only where `quant=auto` asks for it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from distlora.config import Config, UserError
from distlora.config.plan import CHOSEN
from distlora.planner.machine import Machine
from distlora.planner.model import PlannedModel

TILE = 4096
"""Tokens of an MLP's tile: thousands, as weights in NF4 are dequantized for each (config/training.py)."""
TILED_FROM = 16_384
"""Tokens of a row from which a tile is worth that."""
RECOMPUTES = ("none", "selective", "block", "offload")
"""Modes of train.checkpointing, from the one that computes least twice to the one that keeps least on the device."""

Settings = Mapping[str, Any]
"""Values by dotted name."""
_GROUPS = {"quant.method": "quant", "gpu.name": "gpu", "cluster.launcher": "cluster"}
"""Settings for which conf/ has a group, by whose name they are typed."""


def value_of(config: Config, setting: str) -> Any:
    """Return the value of a setting by its dotted name, such as `train.micro_batch`."""
    section, _, name = setting.partition(".")
    return getattr(getattr(config, section), name)


def with_settings(config: Config, settings: Settings) -> Config:
    """Return the config with other values. Raises UserError for values that exclude each other."""
    sections: dict[str, dict[str, Any]] = {}
    for setting, value in settings.items():
        section, _, name = setting.partition(".")
        sections.setdefault(section, {})[name] = value
    # One after the other would meet states that are refused, such as offload_base before backend.
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)


def if_valid(config: Config, settings: Settings) -> Config | None:
    """Return the config with other values, or None for values that exclude each other."""
    try:
        return with_settings(config, settings)
    except UserError:
        return None


def typed(setting: str, value: object) -> str:
    """Return a setting as a command-line override."""
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
    return f"{_GROUPS.get(setting, setting)}={shown}"


def own_quantization(config: Config, model: PlannedModel) -> tuple[str, str] | None:
    """Return (quant.method, reason) if the training method or the stored base leaves no choice, else None."""
    if config.adapter.method == "full":
        return "none", "adapter=full trains every parameter"
    if model.settings.get("quantization_config") is not None:
        return "nf4", f"{model.name} is in NF4 already"
    if config.adapter.for_nf4:
        return "nf4", "the adapter starts from what NF4 loses of the base"
    if config.train.keep_dequantized:
        return "nf4", "train.keep_dequantized=true keeps what is dequantized"
    return None


def storages(config: Config, machine: Machine, fixed: Collection[str]) -> list[Settings]:
    """Return the backends and places of the base to try.

    They are the given ones and, if several GPUs share the base, FSDP2, ZeRO-3, and ZeRO-3 with offload.
    """
    said = {name: value_of(config, name) for name in ("parallel.backend", "parallel.offload_base")}
    cuts = machine.is_gpu and machine.ranks > 1 and config.adapter.trains_base is None
    cuts = cuts and config.parallel.deepspeed_config is None  # That file says where it lies.
    found: list[Settings] = [{}]
    for backend, offloads in (("fsdp2", False), ("zero3", False), ("zero3", True)) if cuts else ():
        other = {"parallel.backend": backend, "parallel.offload_base": offloads}
        # FSDP2 alone has blocks that stay gathered, and DeepSpeed alone a file of its settings.
        if backend == "zero3" and config.parallel.resident_blocks != 0:
            other["parallel.resident_blocks"] = 0
        new = {name for name, value in other.items() if value != value_of(config, name)}
        if not new & set(fixed) and any(other[name] != said[name] for name in said):
            found.append(other)
    return found


def copies(config: Config, machine: Machine, fixed: Collection[str]) -> list[Settings]:
    """Ranks that may cut a copy of the base: as it is said, all, those of a machine, each alone."""
    setting, said = "parallel.shard_degree", config.parallel.shard_degree
    if setting in fixed or machine.ranks == 1:
        return [{}]
    machines = -(-machine.ranks // machine.ranks_per_machine)
    values = [None, *(["node"] if machines > 1 and machine.ranks_per_machine > 1 else []), 1]
    return [{}, *({setting: value} for value in values if value != said)]


def ways(config: Config, model: PlannedModel, machine: Machine, fixed: Collection[str]) -> Iterator[Settings]:
    """Yield every combination of free values of accumulation, checkpointing, MLP tiles, kept weights and prefetch.

    Leaves out combinations that cannot be better: block accumulation without sharding, and tiles for short sequences or
    experts.
    """
    shards = config.shard_degree(machine.ranks)

    def free(setting: str, *values: Any) -> list[Any]:
        said = value_of(config, setting)
        return [said] if setting in fixed else [said, *(value for value in values if value != said)]

    tiles = (None, TILE) if config.data.sequence_length >= TILED_FROM and model.shapes.family.experts is None else ()
    values = {
        "train.accumulate": free("train.accumulate", *(("step", "block") if shards > 1 else ())),
        "train.checkpointing": free("train.checkpointing", *RECOMPUTES),
        "train.mlp_tile": free("train.mlp_tile", *tiles),
        "train.keep_dequantized": free("train.keep_dequantized", False, True),
        "parallel.prefetch": free("parallel.prefetch", *((True, False) if shards > 1 else ())),
    }
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def micro_batches(config: Config, machine: Machine, fixed: Collection[str] = ()) -> list[int]:
    """Rows that a rank may run at once, ascending: those that divide its rows, as the last would be part empty."""
    said = config.train.micro_batch
    rows = -(-config.train.global_batch // machine.ranks)
    return [said] if "train.micro_batch" in fixed else sorted({said, *(n for n in range(1, rows + 1) if rows % n == 0)})


def slices_for_nothing(said: Config, config: Config, machine: Machine) -> bool:
    """Return True if train.accumulate was changed for a step of one micro-batch."""
    return config.accumulation(machine.ranks) == 1 and config.train.accumulate != said.train.accumulate


def changed(before: Config, after: Config, among: Collection[str] = CHOSEN) -> dict[str, Any]:
    """Return the settings of `among` that differ, in the order of CHOSEN."""
    found = {setting: value_of(after, setting) for setting in CHOSEN if setting in among}
    return {setting: value for setting, value in found.items() if value != value_of(before, setting)}
