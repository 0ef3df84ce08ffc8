"""Explain why a setting was chosen, by its effect and the plans with and without it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distlora.config import Config
from distlora.planner import Plan, plan_of
from distlora.planner.choice.space import Settings, changed, if_valid, typed, value_of
from distlora.system.numbers import size

_TOGETHER = ("parallel.backend", "parallel.offload_base")
"""DeepSpeed alone keeps the base in host memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A setting that was chosen, or two that belong together, and why."""

    settings: Settings
    why: str

    @property
    def typed(self) -> str:
        """The settings as command-line overrides."""
        return " ".join(typed(name, value) for name, value in self.settings.items())

    def __str__(self) -> str:
        return f"{self.typed}: {self.why}"


def changes_of(said: Config, plan: Plan, reserve: float) -> tuple[Change, ...]:
    """Return the settings in which a plan differs from the given ones, each with its effect alone.

    `reserve` is the fraction of the need that was to stay free.
    """
    new = changed(said, plan.config)
    together = [name for name in _TOGETHER if name in new]
    groups = [together] if together else []
    groups += [[name] for name in new if name not in together]
    return tuple(_change(said, plan, {name: new[name] for name in group}, reserve) for group in groups)


def why_quantized(plan: Plan, own: str | None, other: Plan | None) -> Change:
    """Return the value that quant=auto became, with the reason.

    `own`: the reason if nothing else was possible. `other`: the fastest plan with the other value, if it fits too.
    """
    settings = {"quant.method": plan.config.quant.method}
    if own is not None:
        return Change(settings=settings, why=own)
    times = plan.time, None if other is None else other.time
    if plan.config.quant.method == "none":
        end = ""
        if times[0] is not None and times[1] is not None:
            end = f": {times[0].tokens_per_second:,.0f} tokens/s, in NF4 {times[1].tokens_per_second:,.0f}"
        return Change(settings=settings, why=f"the base fits in 16 bits, {_of_usable(plan)}{end}")
    if other is not None and times[0] is not None and times[1] is not None:
        faster = f"{times[1].seconds / times[0].seconds:.2f}x faster"
        speeds = f"{times[0].tokens_per_second:,.0f} tokens/s, not {times[1].tokens_per_second:,.0f}"
        why = f"the base would fit in 16 bits, {_of_usable(other)}, but NF4 is {faster}: {speeds}"
        return Change(settings=settings, why=why)
    in_16_bits = if_valid(plan.config, {"quant.method": "none", "train.keep_dequantized": False})
    assert in_16_bits is not None, "16 bits were tried"
    needed = plan_of(in_16_bits, plan.model, plan.machine).device.total
    return Change(settings=settings, why=f"in 16 bits it would take {size(needed)}, in NF4 {_of_usable(plan)}")


def _change(said: Config, plan: Plan, settings: Settings, reserve: float) -> Change:
    without = if_valid(plan.config, {name: value_of(said, name) for name in settings})
    meaning = "; ".join(_meanings(plan, settings))
    before = None if without is None else plan_of(without, plan.model, plan.machine)
    end = "" if before is None else _difference(before, plan, reserve)
    return Change(settings=settings, why=f"{_of_usable(plan)}, {meaning}{end}")


def _of_usable(plan: Plan) -> str:
    usable = plan.machine.usable_bytes
    return size(plan.device.total) + ("" if usable is None else f" of {size(usable)}")


def _difference(before: Plan, after: Plan, reserve: float) -> str:
    """Return the effect of a change alone: the run fits, the time, or the network traffic."""
    if before.lacks(reserve) is not None:
        return f": else {size(before.device.total)}{', too near to it' if before.lacks() is None else ''}"
    times = before.time, after.time
    if times[0] is not None and times[1] is not None:
        ratio = times[0].seconds / times[1].seconds
        return f": {ratio:.2f}x faster" if ratio >= 1.005 else ""
    moved = before.wire.received - after.wire.received
    return f": {size(moved)} a step less to receive" if moved > 0 else ""


def _meanings(plan: Plan, settings: Settings) -> Iterator[str]:
    for name, value in settings.items():
        if name != "parallel.backend" or len(settings) == 1:
            yield _meaning(name, value, plan)


def _meaning(name: str, value: Any, plan: Plan) -> str:
    """Return the effect of a setting in this plan, in words."""
    blocks, passes = plan.model.shapes.num_layers, plan.config.accumulation(plan.machine.ranks)
    match name:
        case "train.micro_batch":
            return f"{value:,} row{'s' if value > 1 else ''} at once"
        case "train.mlp_tile" if value is not None:
            return f"MLPs run on {value:,} tokens at a time"
        case "parallel.resident_blocks":
            return f"{value} of {blocks} blocks stay gathered" if value else "no block stays gathered"
        case "train.accumulate" if value == "block":
            return f"each block is gathered twice a step, not {2 * passes} times"
        case "parallel.offload_base" if value:
            return f"the base waits in host memory ({size(plan.host.machine)} a machine in all)"
        case "parallel.shard_degree" if value is None:
            return f"one copy of the base is cut over all {plan.machine.ranks:,} ranks"
    return _MEANINGS[name, value]


_MEANINGS: dict[tuple[str, Any], str] = {
    ("train.checkpointing", "none"): "nothing is recomputed",
    ("train.checkpointing", "selective"): "MLPs alone are recomputed",
    ("train.checkpointing", "block"): "each block is recomputed from its input",
    ("train.checkpointing", "offload"): "the blocks' inputs wait in host memory",
    ("train.accumulate", "step"): "a micro-batch's inputs are kept at a time",
    ("train.mlp_tile", None): "MLPs run on whole rows",
    ("train.keep_dequantized", True): "weights are dequantized twice a step, not three times",
    ("train.keep_dequantized", False): "no weights are kept from a block's recomputation to its backward",
    ("parallel.prefetch", True): "the next block is gathered while one computes",
    ("parallel.prefetch", False): "a gathered block less is there",
    ("parallel.offload_base", False): "the base stays on the GPUs",
    ("parallel.backend", "zero3"): "DeepSpeed cuts the base",
    ("parallel.backend", "fsdp2"): "FSDP2 cuts the base",
    ("parallel.shard_degree", "node"): "each machine has a copy, so that gradients alone travel between them",
    ("parallel.shard_degree", 1): "each rank has the base whole and gathers nothing",
}
