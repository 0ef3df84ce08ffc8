"""Compare the memory that a rank measured in a step with the plan, and name the category that differs most.

No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distlora.config.json_files import Shape
from distlora.planner.memory import Kind
from distlora.system.numbers import size

MISS = 0.05
"""Of the measured peak: by how much a plan may be off."""
LEAST_MISS = 64 * 10**6
"""Bytes by which any plan may be off: a small model's plan misses 5 % by what nobody has to act on."""

RECORDED: Shape = {
    "device?": {"by_kind": {"*": int}, "held": {"*": int}, "moments": {"*": {"*": int}}, "peak": int, "total": int},
    "machine?": {"is_gpu": bool, "gpu?": (str, type(None))},
}
"""What is read of RUN/plan.json."""

_TOGETHER = {
    "gathered": ("gathered", "communication"),
    "working": ("working", "logits", "scratch", "gradients"),
}
"""Kinds that a measurement tells apart by which part of the step took them, and the plan by what they are for. A
gradient of the base that is on its way is one of what runs until the step ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRank:
    """Measured memory of the rank that had most."""

    rank: int
    peak: int
    by_kind: Mapping[Kind, int]
    """Bytes by category at that peak."""
    part: str
    """Part of the step with the peak: a moment of the plan, or `forward`."""


def figures(measured: MeasuredRank, plan: Mapping[str, Any]) -> dict[str, int]:
    """For metrics.jsonl, wandb and summary.json, in bytes. `plan` is RUN/plan.json; empty where there is none."""
    values = {"memory/peak": measured.peak}
    device = plan.get("device")
    if device is not None:
        at_peak = planned_kinds(device, None)
        values["memory/planned"] = sum(at_peak.values())
    values |= {f"memory/{kind}": nbytes for kind, nbytes in measured.by_kind.items()}
    if device is not None:
        values |= {f"memory_planned/{kind}": nbytes for kind, nbytes in at_peak.items()}
    return values


def warning(measured: MeasuredRank, plan: Mapping[str, Any]) -> str | None:
    """Return a warning if a peak differs from the plan by more than MISS and LEAST_MISS, with the category behind it.

    Returns None for a GPU that the plan did not know, since its assumptions are not the run's.
    """
    device, machine = plan.get("device"), plan.get("machine", {})
    if device is None or (machine.get("is_gpu") and machine.get("gpu", machine.get("card")) is None):
        return None
    planned = sum(planned_kinds(device, None).values())
    if abs(planned - measured.peak) <= max(MISS * measured.peak, LEAST_MISS):
        return None
    more = measured.peak > planned
    here, there = grouped(measured.by_kind), grouped(planned_kinds(device, measured.part))
    misses = {kind: here.get(kind, 0) - there.get(kind, 0) for kind in here | there}
    worst = max(misses, key=lambda kind: misses[kind] if more else -misses[kind])
    named = ", ".join(_TOGETHER.get(worst, (worst,)))
    share = abs(planned / measured.peak - 1)
    return (
        f"WARNING: a step took {size(measured.peak)} at its peak on rank {measured.rank}, {share:.1%} "
        f"{'more' if more else 'less'} than the {size(planned)} that were planned; most of it is {named}: "
        f"{size(here.get(worst, 0))} measured, {size(there.get(worst, 0))} planned"
    )


def planned_kinds(device: Mapping[str, Any], part: str | None) -> dict[str, int]:
    """Return the planned bytes by category at the moment `part`; the plan's worst moment if it has no such part."""
    moments = {moment: kinds for moment, kinds in device["moments"].items() if moment != "loading"}
    meant = {"forward": ("images", "embedding", "forward"), "block": ("block", "embedding_backward")}.get(
        part or "", (part,)
    )
    planned: dict[str, int] = dict(device["held"])
    at = [moments[moment] for moment in meant if moment in moments] or list(moments.values())
    for kind, nbytes in max(at, key=lambda kinds: sum(kinds.values()), default={}).items():
        planned[kind] = planned.get(kind, 0) + nbytes
    return planned


def grouped(by_kind: Mapping[Any, int]) -> dict[str, int]:
    """Bytes by kind, those that a measurement does not tell apart under one name."""
    group_of = {kind: group for group, kinds in _TOGETHER.items() for kind in kinds}
    sums: dict[str, int] = {}
    for kind, nbytes in by_kind.items():
        group = group_of.get(kind, kind)
        sums[group] = sums.get(group, 0) + nbytes
    return sums
