"""Choose the settings of `plan=auto` and `quant=auto`, and say why. Imports no torch.

The chosen settings are the fastest that fit (search.py). Results do not depend on them, but for quant.method: 16 bits
if they fit on the GPUs and are not far slower than NF4, else NF4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distlora.config import Config
from distlora.config.plan import CHOSEN
from distlora.planner import Plan
from distlora.planner.choice.search import Search, Settings, typed
from distlora.system.numbers import size

TOO_SLOW = 1.5
"""Ratio of step times from which NF4 is taken although 16 bits fit. Plans are at 0.97 to 1.34 of published speeds
(README.md), so the faster of two plans less than 1.4 apart is unknown."""
_TOGETHER = ("parallel.backend", "parallel.offload_base")
"""Settings that are explained together: DeepSpeed alone offloads the base."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The settings of a run after `plan=auto` and `quant=auto`, with its plan."""

    plan: Plan
    search: Search
    """The search that chose them, with the settings before it."""
    only_reason: str | None = None
    """Reason if quant=auto had one possible value."""
    other: Plan | None = None
    """The fastest plan with the other value of quant.method, if that fits too."""

    @property
    def config(self) -> Config:
        """The chosen settings, without an `auto` in quant.method."""
        return self.plan.config

    @property
    def changes(self) -> tuple[Change, ...]:
        """The chosen settings with reasons. Makes a plan without each of them."""
        given = self.search.with_settings({"quant.method": self.config.quant.method})
        new = given.changed(self.plan)
        together = [name for name in _TOGETHER if name in new]
        groups = [together] if together else []
        groups += [[name] for name in new if name not in together]
        changes = tuple(_change(given, self.plan, {name: new[name] for name in group}) for group in groups)
        return changes if self.search.config.quant.method != "auto" else (self._why_quantized(), *changes)

    def _why_quantized(self) -> Change:
        """Return the value that quant=auto became, with the reason."""
        plan, other = self.plan, self.other
        settings = {"quant.method": plan.config.quant.method}
        if self.only_reason is not None:
            return Change(settings=settings, why=self.only_reason)
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
        in_16_bits = plan.replan({"quant.method": "none", "train.keep_dequantized": False})
        assert in_16_bits is not None, "16 bits were tried"
        needed = in_16_bits.device.total
        return Change(settings=settings, why=f"in 16 bits it would take {size(needed)}, in NF4 {_of_usable(plan)}")


def choose(search: Search) -> Choice:
    """Set every setting of CHOSEN that is not fixed to the value that makes the run fastest within the memory.

    quant.method is chosen only if it is `auto`. Without known rates, the plan that recomputes least wins, then the one
    with the least traffic. If nothing fits, or the memory is unknown, the settings stay as they are, with quant=nf4 for
    auto; `nearest` finds what would fit.
    """
    methods, only_reason = _quantizations(search)
    plans: list[Plan] = []
    for method in methods if search.machine.usable_bytes is not None else ():
        given = search.with_settings({"quant.method": method})
        # 16 bits are worth it if they lie on the GPUs; offloaded, NF4 is a quarter of the traffic.
        if method == "none" and len(methods) > 1:
            given = dataclasses.replace(given, fixed={*search.fixed, "parallel.offload_base"})
        plan = given.fastest()
        plans += [] if plan is None else [plan]
        if plan is not None and plan.time is None:
            break  # The faster method is unknown.
    if len(plans) > 1 and _is_too_slow(*plans):
        plans.reverse()
    plan = plans[0] if plans else search.plan({"quant.method": methods[-1]})
    return Choice(plan=plan, search=search, only_reason=only_reason, other=plans[1] if len(plans) > 1 else None)


def resolve_quantization(search: Search) -> Choice:
    """Choose quant.method only, as `choose` does."""
    return choose(dataclasses.replace(search, fixed=frozenset(CHOSEN)))


def _quantizations(search: Search) -> tuple[list[str], str | None]:
    """Return the values of quant.method to try, in order, and the reason if `auto` leaves only one."""
    if search.config.quant.method != "auto":
        return [search.config.quant.method], None
    only = search.own_quantization()
    if only is not None:
        return [only[0]], only[1]
    if search.machine.usable_bytes is None:
        return ["nf4"], "how much memory the GPU has is not known"
    return ["none", "nf4"], None


def _is_too_slow(plan: Plan, other: Plan) -> bool:
    """Return True if `plan` takes more than TOO_SLOW times as long as `other`."""
    times = plan.time, other.time
    return times[0] is not None and times[1] is not None and times[0].seconds > TOO_SLOW * times[1].seconds


def _change(given: Search, plan: Plan, settings: Settings) -> Change:
    """Return the reason of a change, from the plans with and without it."""
    without = plan.replan({name: given.config.value_of(name) for name in settings})
    end = "" if without is None else _difference(without, plan, given.reserve)
    return Change(settings=settings, why=f"{_of_usable(plan)}, {'; '.join(_meanings(plan, settings))}{end}")


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
            return f"the base is offloaded to host memory ({size(plan.host.machine)} per node in all)"
        case "parallel.shard_degree" if value is None:
            return f"one copy of the base is sharded over all {plan.machine.ranks:,} ranks"
    return _MEANINGS[name, value]


_MEANINGS: dict[tuple[str, Any], str] = {
    ("train.checkpointing", "none"): "nothing is recomputed",
    ("train.checkpointing", "selective"): "MLPs alone are recomputed",
    ("train.checkpointing", "block"): "each block is recomputed from its input",
    ("train.checkpointing", "offload"): "the layers' inputs are offloaded to host memory",
    ("train.accumulate", "step"): "a micro-batch's inputs are kept at a time",
    ("train.mlp_tile", None): "MLPs run on whole rows",
    ("train.keep_dequantized", True): "weights are dequantized twice a step, not three times",
    ("train.keep_dequantized", False): "no weights are kept from a block's recomputation to its backward",
    ("parallel.prefetch", True): "the next block is gathered while one computes",
    ("parallel.prefetch", False): "a gathered block less is there",
    ("parallel.offload_base", False): "the base stays on the GPUs",
    ("parallel.backend", "zero3"): "DeepSpeed shards the base",
    ("parallel.backend", "fsdp2"): "FSDP2 shards the base",
    ("parallel.shard_degree", "node"): "each node has a replica, so only gradients travel between nodes",
    ("parallel.shard_degree", 1): "each rank has the base whole and gathers nothing",
}
