"""Why a setting was chosen, in a sentence with numbers: what it means, and the plan with it beside the plan without.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distlora.config import Config
from distlora.plan import Plan, plan_of
from distlora.plan.space import Settings, changed, if_valid, typed, value_of

GB = 1e9

_TOGETHER = ("parallel.backend", "parallel.offload_base")
"""DeepSpeed alone keeps the base in host memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A setting that was chosen, or two that belong together, and why."""

    settings: Settings
    why: str

    @property
    def typed(self) -> str:
        """As they are typed."""
        return " ".join(typed(name, value) for name, value in self.settings.items())

    def __str__(self) -> str:
        return f"{self.typed}: {self.why}"


def changes_of(said: Config, plan: Plan) -> tuple[Change, ...]:
    """What a plan has otherwise than the settings as they were said, each with the difference that it makes alone."""
    new = changed(said, plan.config)
    together = [name for name in _TOGETHER if name in new]
    groups = [together] if together else []
    groups += [[name] for name in new if name not in together]
    return tuple(_change(said, plan, {name: new[name] for name in group}) for group in groups)


def why_quantized(said: Config, plan: Plan, own: str | None) -> Change:
    """What quant=auto became; `own`: why nothing else was possible."""
    method = said.quant.method
    if own is not None:
        return Change(settings={"quant.method": method}, why=own)
    if method == "none":
        return Change(settings={"quant.method": method}, why=f"the base fits in 16 bits: {_of_usable(plan)}")
    in_16_bits = if_valid(plan.config, {"quant.method": "none", "train.keep_dequantized": False})
    assert in_16_bits is not None, "16 bits were tried"
    needed = plan_of(in_16_bits, plan.model, plan.machine).device
    why = f"in 16 bits it would take {needed.total / GB:.1f} GB, in NF4 {_of_usable(plan)}"
    return Change(settings={"quant.method": method}, why=why)


def _change(said: Config, plan: Plan, settings: Settings) -> Change:
    without = if_valid(plan.config, {name: value_of(said, name) for name in settings})
    meaning = "; ".join(_meanings(plan, settings))
    if without is None:
        return Change(settings=settings, why=f"{_of_usable(plan)}, {meaning}")
    before = plan_of(without, plan.model, plan.machine)
    usable = plan.machine.usable_bytes
    if usable is not None and before.device.total > usable:
        return Change(settings=settings, why=f"{_of_usable(plan)}, {meaning}; else {before.device.total / GB:.1f} GB")
    return Change(settings=settings, why=f"{_of_usable(plan)}, {meaning}{_gain(before, plan)}")


def _of_usable(plan: Plan) -> str:
    usable = plan.machine.usable_bytes
    of = "" if usable is None else f" of {usable / GB:.1f}"
    return f"{plan.device.total / GB:.1f}{of} GB"


def _gain(before: Plan, after: Plan) -> str:
    """What it is worth: time, else bytes."""
    moved = before.wire.received - after.wire.received
    return f", {moved / GB:.1f} GB a step less to receive" if moved > 0 else ""


def _meanings(plan: Plan, settings: Settings) -> Iterator[str]:
    config = plan.config
    for name, value in settings.items():
        if name == "parallel.backend" and len(settings) > 1:
            continue
        yield _meaning(name, value, plan, config)


def _meaning(name: str, value: Any, plan: Plan, config: Config) -> str:
    """What a setting does, in this plan."""
    machine, passes = plan.machine, config.accumulation(plan.machine.ranks)
    said = {
        ("train.checkpointing", "none"): "nothing is recomputed",
        ("train.checkpointing", "selective"): "MLPs alone are recomputed",
        ("train.checkpointing", "block"): "each block is recomputed from its input",
        ("train.checkpointing", "offload"): "the blocks' inputs wait in host memory",
        ("train.accumulate", "block"): f"each block is gathered twice a step, not {2 * passes} times",
        ("train.accumulate", "step"): "one micro-batch's inputs are kept at a time",
        ("train.mlp_tile", None): "MLPs run on whole rows",
        ("train.keep_dequantized", True): "weights are dequantized twice a step, not three times",
        ("train.keep_dequantized", False): "no block's weights are kept from its recomputation to its backward",
        ("parallel.prefetch", True): "the next block is gathered while one computes",
        ("parallel.prefetch", False): "one gathered block less is there",
        ("parallel.offload_base", True): "the base waits in host memory",
        ("parallel.offload_base", False): "the base stays on the cards",
        ("parallel.backend", "zero3"): "DeepSpeed cuts the base",
        ("parallel.backend", "fsdp2"): "FSDP2 cuts the base",
        ("parallel.shard_degree", None): f"one copy of the base is cut over all {machine.ranks:,} ranks",
        ("parallel.shard_degree", "node"): "each machine has a copy, so that gradients alone travel between them",
        ("parallel.shard_degree", 1): "each rank has the base whole and gathers nothing",
    }.get((name, value))
    if said is not None:
        return said
    blocks = plan.model.shapes.num_layers
    return {
        "train.micro_batch": f"{value} row{'s' if value != 1 else ''} at once, {passes} times a step",
        "train.mlp_tile": f"MLPs run on {value:,} tokens at a time",
        "parallel.resident_blocks": f"{value} of {blocks} blocks stay gathered",
    }[name]
