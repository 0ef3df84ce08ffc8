"""A plan in words: a few lines at a run's start, the page of `distlora plan`, tables and figures of several plans.

GB are 1e9 bytes, as data sheets and disks have them. Imports no torch.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from distlora.planner import Plan
from distlora.planner.choose import SettingChange, typed
from distlora.planner.memory import KINDS, PHASES, Kind
from distlora.planner.speed.launches import KernelLaunch
from distlora.planner.speed.rates import WAITS, missing_rates, rates_of, total
from distlora.planner.speed.sampling import Sampling
from distlora.planner.speed.scaling import OWN, ScalingRow
from distlora.planner.speed.timing import FLOPS, seconds_of_launches
from distlora.planner.storage import trained_tensors
from distlora.planner.suggest import LargerRun, MultiTrialPlan, Nearest
from distlora.results.figures import Curve, Figure, Style, save_png, save_stacked_bars
from distlora.results.record import Table
from distlora.system.numbers import count, size

Name = TypeVar("Name")

SOURCES = {"folder": "its folder", "hub cache": "its config.json", "built in": "the table of known models"}
"""Source of a model's sizes in words."""
BASES = {"nf4": "NF4", "keep": "kept", "mixed": "mixed", "none": "bf16"}
"""Format of the base by quant.method."""
RECOMPUTED = {
    "none": "recompute none",
    "selective": "recompute MLPs",
    "block": "recompute layers",
    "offload": "recompute layers",
}
"""Recomputation in backward by train.checkpointing."""


WIDTH = 100
"""Characters of a line."""
_LABEL, _BAR = 12, 40


def lines(plan: Plan) -> list[str]:
    """Return the few lines of a plan that a run prints before it starts."""
    device, host, disk = plan.device, plan.host, plan.disk
    gpu = _device(plan)
    fits = {
        True: f"{size(plan.machine.usable_bytes or 0)} available",
        False: f"it does NOT fit{verdict(plan).removeprefix('NO')}",
        None: "unknown whether it fits: name the GPU with gpu=h100 or gpu.memory_gib=80",
    }[plan.fits]
    beside = f"{size(host.process)} Python and torch"
    if plan.machine.is_gpu:
        beside = f"{size(device.total - device.peak)} libraries and allocator"
    kept = f", {size(disk.cache)} for the quantized base" if disk.cache else ""
    moved = f"{size(plan.traffic.received)} received per {gpu}" if plan.traffic.world > 1 else None
    time = None if plan.time is None else time_of(plan)
    lines = [
        f"plan: peak {size(device.peak)} per {gpu} (+{beside}), {PHASES[device.worst]}; {fits}",
        f"  largest: {largest(device.by_kind)}",
        f"  host memory: {size(host.machine)} per node; disk: {size(disk.run)} for the run{kept}",
    ]
    if moved or time:
        lines.append("  per step: " + "; ".join(filter(None, (moved, time))))
    if (empty := empty_rows(plan)) is not None:
        lines.append(f"  {empty}")
    method, stored = plan.config.quant.method, plan.model.shapes.kept_formats
    if stored not in ("", "NF4") and method in ("nf4", "mixed"):
        lines.append(f"  stored in {stored}; quant={method} rounds it again (quant=keep trains on the stored values)")
    return lines


def page(
    plan: Plan,
    *,
    changes: Sequence[SettingChange] = (),
    near: Nearest | None = None,
    larger: Sequence[LargerRun] = (),
    packed: MultiTrialPlan | None = None,
) -> str:
    """Return the plan on one screen.

    `changes`: chosen settings with reasons. `near`: what would fit if this does not. `larger`: larger runs. `packed`:
    the trials trained together, if the plan is of such.
    """
    rows = [
        *_row("model", _model(plan)),
        *_row("trained", _trained(plan)),
        *_row("machine", _machine(plan)),
        *_row("fits", verdict(plan)),
        *(_row("packed", packed_trials(packed)) if packed is not None else ()),
        *(_row("would fit", _near(near)) if near is not None else ()),
        *(line for change in changes for line in _row("chosen", str(change))),
        "",
        *_memory(plan),
        *(line for each in plan.uncounted for line in _row("not counted", each)),
        "",
        *_row("host memory", _host(plan)),
        *_row("disk", _disk(plan)),
        *_row("traffic", _traffic(plan)),
        *_row("operations", _operations(plan)),
        *(_row("images", images) if (images := _images(plan)) is not None else ()),
        *_row("time", time_of(plan)),
        *(_row("sampling", sampling_text(plan.sampling, plan)) if plan.sampling is not None else ()),
        *(_row("batch", empty) if (empty := empty_rows(plan)) is not None else ()),
        *_row("settings", settings(plan)),
        *(_row("larger", "; ".join(map(str, larger))) if larger else ()),
    ]
    return "\n".join(rows)


def verdict(plan: Plan) -> str:
    """Return whether the plan fits, and by how much, in words."""
    needed, usable = plan.device.total, plan.machine.usable_bytes
    what = _device(plan)
    if usable is None:
        return f"unknown: needs {size(needed)} per {what}; name the GPU with gpu=NAME"
    host, has = plan.host, plan.machine.host_bytes
    if not plan.machine.is_gpu and has is not None:  # Its processes share the node's memory.
        needed, usable, what = host.workers, has, "node"
    elif plan.lacks() == "host":
        return f"NO: needs {size(host.machine)} of host memory per node, {size(has or 0)} available"
    if plan.fits:
        return f"yes: {size(needed)} of {size(usable)} per {what}, {size(usable - needed)} to spare"
    return f"NO: needs {size(needed)} per {what}, {size(usable)} available ({size(needed - usable)} short)"


def packed_trials(packed: MultiTrialPlan) -> str:
    """Return the cost of trials trained together beside one trial, and how many fit, in words."""
    alone, plan, device = packed.alone, packed.plan, _device(packed.plan)
    number = f"{packed.trials} trials share one base" if packed.trials > 1 else "1 trial"
    text = f"{number}: {size(plan.device.total)} per {device}, one alone {size(alone.device.total)}"
    if packed.ratio is not None:
        text += f"; a step takes {packed.ratio:.2f} x one trial's time, one after the other {packed.trials} x"
    if plan.traffic.gathered:
        text += f"; it gathers {plan.traffic.gathered / alone.traffic.gathered:.2f} x the bytes"
    if packed.most is None:
        return f"{text}; how many fit is unknown"
    if packed.beyond is None:
        return f"{text}; {packed.most} fit; more were not tried"
    text += f"; {packed.most or 'none'} fit{'s' if packed.most == 1 else ''}"
    wanted = packed.beyond.device.total - (packed.beyond.machine.usable_bytes or 0)
    if wanted <= 0:  # The GPU has enough memory, the host has not.
        return f"{text}, as {packed.most + 1} would take {size(packed.beyond.host.machine)} of host memory"
    binds = packed.binds
    assert binds is not None
    return f"{text}; {packed.most + 1} are {size(wanted)} short, mostly of {KINDS[binds]}"


def empty_rows(plan: Plan) -> str | None:
    """Return a note on empty sequences if a step has fewer sequences than its ranks compute, else None.

    With sampled answers the number of sequences follows from their lengths.
    """
    train, ranks = plan.config.train, plan.machine.ranks
    computed = train.accumulation(ranks) * train.micro_batch * ranks
    if computed == train.global_batch or train.needs.data == "prompts":
        return None
    device = _device(plan)
    devices = f"{ranks:,} {device}{'' if ranks == 1 else 'es' if device == 'process' else 's'}"
    return (
        f"train.global_batch={train.global_batch} leaves {computed - train.global_batch:,} of {computed:,} sequences "
        f"per step empty on {devices}; train.global_batch={computed} takes the same time"
    )


def needs(plan: Plan) -> str:
    """Return the need of the memory that decides, with its largest category: `8.75 GB per GPU (...)`."""
    host, by_kind = plan.host, largest(plan.device.by_kind)
    if not plan.machine.is_gpu:
        return f"{size(host.workers)} per node (per process {by_kind})"
    if plan.lacks() == "host":
        return f"{size(host.machine)} of host memory per node ({_waiting(plan)} per process)"
    return f"{size(plan.device.total)} per GPU ({by_kind})"


def _row(label: str, text: str) -> Iterator[str]:
    """Yield a label and its text over as many lines as needed."""
    whole = re.sub(r"(?<=\d) (?=[kMGTP]?B\b)", "\0", text)  # A number and its unit stay on one line.
    lines = textwrap.wrap(whole, WIDTH - _LABEL, break_long_words=False, break_on_hyphens=False)
    for line in lines or [""]:
        yield f"{label:<{_LABEL}}{line}".replace("\0", " ")
        label = ""


def _model(plan: Plan) -> str:
    shapes, model = plan.model.shapes, plan.model
    text = (
        f"{model.name}: {count(shapes.numel)} parameters, {shapes.num_layers} layers of {shapes.hidden:,}; sizes from "
    )
    return text + SOURCES[model.source] + ("" if model.note is None else f"; {model.note}")


def _trained(plan: Plan) -> str:
    config, shapes = plan.config, plan.model.shapes
    trained = sum(tensor.numel for tensor in trained_tensors(plan.work, shapes))
    share = f"{count(trained)} ({trained / shapes.numel:.2%})"
    base = {"nf4": "in 4 bits (NF4)", "none": f"in {config.train.dtype}"}
    base["keep"] = f"in the checkpoint's format ({shapes.kept_formats})"
    base["mixed"] = f"in formats of {config.quant.budget or 'given'} bits per weight"
    if config.adapter.method == "full":
        return f"everything, {count(trained)} parameters; fp32 masters"
    targets = config.adapter.target_modules
    method = "DoRA" if config.adapter.use_dora else "LoRA"
    where = targets if isinstance(targets, str) else ", ".join(targets)
    return f"{method} of rank {config.adapter.r} on {where}: {share}; the base stays {base[config.quant.method]}"


def machines_of(plan: Plan) -> str:
    """Return the nodes in words: `2 nodes of 8 x H100 SXM 80 GB`."""
    machine = plan.machine
    machines, per_node = -(-machine.ranks // machine.ranks_per_machine), min(machine.ranks, machine.ranks_per_machine)
    if not machine.is_gpu:
        what = f"this CPU, {per_node} process{'es' if per_node > 1 else ''}"
    elif machine.name.startswith("a GPU"):  # Of a given size, without a name.
        what = f"{per_node} GPU{'s' if per_node > 1 else ''}{machine.name.removeprefix('a GPU')}"
    else:
        what = f"{per_node} x {machine.name}"
    return what if machines == 1 else f"{machines} nodes of {what}"


def _machine(plan: Plan) -> str:
    machine, shards, text = plan.machine, plan.traffic.shards, machines_of(plan)
    text += "" if machine.is_gpu else " (gpu=NAME: another GPU)"
    if machine.ranks == 1:
        return text
    if shards == 1:
        return f"{text}; the base is replicated"
    backend = {"fsdp2": "FSDP2", "zero3": "DeepSpeed ZeRO-3"}[plan.config.parallel.backend]
    if shards == machine.ranks:
        return f"{text}; {backend} shards the base over all of them"
    return f"{text}; {backend} shards the base over {shards} of them, {machine.ranks // shards} replicas in all"


def _near(near: Nearest) -> str:
    """Return what would fit and its cost in speed and host memory."""
    text = str(near)
    nearest = near.same or near.other or (near.more if near.gpu is None else None)
    if nearest is not None:
        plan = nearest.plan
        text += "" if plan.time is None else f"; then {plan.time.tokens_per_second:,.0f} tokens/s"
        text += f", {size(plan.host.machine)} of host memory per node" if plan.host.base or plan.host.inputs else ""
    return text


def _memory(plan: Plan) -> Iterator[str]:
    """Yield a line per category: its bytes, and a bar as long as its fraction of the available memory."""
    device, usable = plan.device, plan.machine.usable_bytes
    # A bar shows a share of what there is, or where that would show nothing, of what is needed.
    whole = device.total if usable is None or device.total * _BAR < usable else max(device.total, usable)
    unit, scale = ("GB", 1e9) if device.total >= 1e9 else ("MB", 1e6)
    what = "peak memory per GPU" if plan.machine.is_gpu else "peak training memory per process"
    yield f"{what}, {PHASES[device.worst]} ({unit}):"
    place = 0
    width = max(len(KINDS[kind]) for kind in device.by_kind)
    hundredths = rounded(device.by_kind, scale / 100)
    for kind, nbytes in device.by_kind.items():
        start, end = round(_BAR * place / whole), round(_BAR * (place + nbytes) / whole)
        place += nbytes
        if hundredths[kind]:  # Categories of 0.00 are left out.
            start = min(start, _BAR - 1)
            bar = " " * start + "#" * max(end - start, 1)
            yield f"  {KINDS[kind]:<{width}} {hundredths[kind] / 100:>8.2f}  |{bar:<{_BAR}}|"
    end = round(_BAR * place / whole)
    bar = "#" * end + "." * (_BAR - end)
    yield f"  {'total':<{width}} {place / scale:>8.2f}  |{bar}|" + (
        "" if usable is None else f" of {usable / scale:,.2f}"
    )


def _host(plan: Plan) -> str:
    host, machine = plan.host, plan.machine
    text = f"{size(host.while_loading)} per process while loading, {size(host.while_training)} while training"
    text += f" ({kept})" if (kept := _waiting(plan)) else ""
    text += f"; {size(host.machine)} per node"
    return text + ("" if machine.host_bytes is None else f" of {size(machine.host_bytes)}")


def _waiting(plan: Plan) -> str:
    """Return the host memory of a process beside its device memory, in words."""
    host = plan.host
    kinds = {
        "the base": host.base,
        "layer inputs": host.inputs,
        "paged optimizer states": host.moments,
        "background saves": host.copies,
    }
    return ", ".join(f"{name} {size(nbytes)}" for name, nbytes in kinds.items() if nbytes)


def _disk(plan: Plan) -> str:
    disk = plan.disk
    text = f"{size(disk.base)} for the model"
    text += f", {size(disk.cache)} for its quantized shards" if disk.cache else ""
    return (
        f"{text}, {size(disk.run)} for the run: up to {disk.checkpoints_kept} checkpoints of {size(disk.checkpoint)}, "
        f"the result {size(disk.result)}"
    )


def _traffic(plan: Plan) -> str:
    step, machine = plan.traffic, plan.machine
    if step.world == 1:
        return "none: there is one process"
    exchanged = f"{size(step.exchanged)} exchanged, " if step.exchanged else ""
    reduced = size(step.reduced + step.scattered + step.reduced_rows)
    text = f"per step and rank: {size(step.gathered)} gathered, {exchanged}{reduced} reduced, "
    text += f"{size(step.received)} received"
    if machine.ranks > machine.ranks_per_machine:
        text += f", {size(step.into_machine(machine.ranks_per_machine))} into a node from the others"
    return text


def _operations(plan: Plan) -> str:
    compute = plan.compute
    parts = ", ".join(f"{FLOPS[kind]} {percent}%" for kind, percent in shares(compute.by_kind))
    tera = f"{compute.total / 1e12:,.0f}" if compute.total >= 1e14 else f"{compute.total / 1e12:.3g}"
    return f"{tera} TFLOP per step on each {_device(plan)}: {parts}"


def _images(plan: Plan) -> str | None:
    """Return what the largest image takes; None without images, or for a tower that was not traced."""
    work, layout = plan.work, plan.model.images
    largest = None if layout is None else layout.largest_image(work.image_max_pixels, work.sequence_length)
    if layout is None or largest is None:
        return None
    number, time = plan.compute.tokens / largest.tokens, ""
    share = number * largest.flops / plan.compute.total
    if (rates := rates_of(work, plan.machine)) is not None:
        launch = KernelLaunch("products", layout.numel * work.itemsize, largest.flops)
        time = f" and {seconds_in_words(number * total(seconds_of_launches([launch], rates)))} to its time"
    return (
        f"the largest has {largest.tokens:,} tokens and takes {size(largest.activation_bytes(work.itemsize))} and "
        f"{largest.flops / 1e12:.3g} TFLOP in the vision tower; where every token is an image's, the tower adds "
        f"{share:.0%} to the operations of a step{time}"
    )


def time_of(plan: Plan) -> str:
    """Return tokens/s, seconds per step and what they go to; hours and cost if they are known."""
    time = plan.time
    if time is None:
        missing = missing_rates(plan.work, plan.machine)
        named = "" if plan.machine.gpu is not None else "gpu=NAME, or "
        return f"unknown without rates of this node: set {named}{', '.join(missing)}"
    waits = ", ".join(f"{percent}% {WAITS[term]}" for term, percent in shares(time.by_term))
    text = f"{time.tokens_per_second:,.0f} tokens/s, {seconds_in_words(time.seconds)} per step: {waits}"
    if time.hours is not None:
        text += f"; {time.steps:,} steps take {seconds_in_words(3600 * time.hours)}"
    if time.cost is not None:
        text += f" and cost {time.cost:,.2f}"
    if (price := time.cost_of_a_million_tokens) is not None:
        text += f"; a million tokens cost {price:.3g}"
    return text


def sampling_text(sampling: Sampling, plan: Plan) -> str:
    """Return how answers are sampled, the memory that it takes beside what training holds, and its speed, in words."""
    gpu = _device(plan)
    base = f", {size(sampling.base_bytes)} for the whole base" if sampling.base_bytes else ""
    base += f", {size(sampling.dense_bytes)} for dequantized weights" if sampling.dense_bytes else ""
    if not sampling.is_whole:
        base = ", the base gathered for each token"
    base += f", {size(sampling.adapter_bytes)} for copies of the adapters" if sampling.adapter_bytes else ""
    steps = "a step" if sampling.steps == 1 else f"{sampling.steps:,} steps"
    text = f"{sampling.answers:,} answers for {steps}, {sampling.rows:,} at once per {gpu}"
    text += f" with {size(sampling.cache_bytes)} of keys and values{base}"
    if models := plan.work.reward_adapters + bool(plan.work.reward_weights):
        text += (
            f"; each answer runs once more through {'a reward model' if models == 1 else 'each reward model'}, whose "
        )
        text += "time is not counted"
    if sampling.seconds is None:
        return text
    return f"{text}; {sampling.tokens_per_second:,.0f} tokens/s, at most {seconds_in_words(sampling.seconds)} a rollout"


def assumptions(plan: Plan) -> Iterator[str]:
    """Return the assumptions of the time, one sentence each."""
    for sentence in () if plan.time is None else plan.time.assumptions:
        yield from textwrap.wrap(sentence, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def seconds_in_words(seconds: float) -> str:
    """Return a duration in words: `0.87 s`, `17.2 s`, `12.3 minutes`, `5.83 hours`, `3.1 days`."""
    for unit, name in ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"


def _device(plan: Plan) -> str:
    return "GPU" if plan.machine.is_gpu else "process"


def settings(plan: Plan) -> str:
    """Return the settings that memory and time depend on, as overrides; rarely set ones only if they are set."""
    config = plan.config
    train, parallel = config.train, config.parallel
    values: dict[str, object] = {
        "quant.method": config.quant.method,
        "data.sequence_length": config.data.sequence_length,
        "train.micro_batch": train.micro_batch,
        "train.global_batch": train.global_batch,
        "train.checkpointing": train.checkpointing,
        "train.accumulate": train.accumulate,
        "optim": config.optim.name,
    }
    rare: dict[str, tuple[object, object]] = {
        # (value, what it is unless it is set)
        "train.mlp_tile": (train.mlp_tile, None),
        "quant.dense_layers": (config.quant.dense_layers, 0),
    }
    if plan.machine.ranks > 1:
        values["parallel"] = parallel.backend
        rare |= {
            "parallel.shard_degree": (parallel.shard_degree, None),
            "parallel.resident_blocks": (parallel.resident_blocks, 0),
            "parallel.offload_base": (parallel.offload_base, False),
            "parallel.experts": (parallel.experts, "gathered"),
            "parallel.prefetch": (parallel.prefetch, True),
        }
    values |= {name: value for name, (value, default) in rare.items() if value != default}
    return " ".join(typed(name, value) for name, value in values.items())


def largest(by_kind: Mapping[Kind, int], count: int = 3) -> str:
    """Return the largest categories: `codes of the base weights 17.1 GB, ...`."""
    kinds = sorted(by_kind.items(), key=lambda entry: -entry[1])[:count]
    return ", ".join(f"{KINDS[kind]} {size(nbytes)}" for kind, nbytes in kinds)


def rounded(parts: Mapping[Name, float], step: float) -> dict[Name, int]:
    """Round each part to whole steps so that they add up to their rounded sum; the largest remainders round up."""
    steps = {name: int(value // step) for name, value in parts.items()}
    left = round(sum(parts.values()) / step) - sum(steps.values())
    for name in sorted(parts, key=lambda name: parts[name] % step, reverse=True)[:left]:
        steps[name] += 1
    return steps


def shares(parts: Mapping[Name, float]) -> list[tuple[Name, int]]:
    """Return the percentage of each part, largest first, 100 in all; parts of 0 % are left out."""
    percents = rounded(parts, sum(parts.values()) / 100)
    ordered = sorted(percents.items(), key=lambda entry: (-entry[1], -parts[entry[0]]))
    return [(name, percent) for name, percent in ordered if percent]


LEGEND = (
    "A cell: peak memory per GPU, tokens/s of all GPUs, and the fastest settings that fit:",
    "- NF4, bf16: format of the base; full: every parameter is trained",
    "- recompute: parts recomputed in backward (train.checkpointing); x N: sequences at once (train.micro_batch)",
    "- slices: a layer runs all sequences of a step in turn (train.accumulate=block); tiles: tokens (train.mlp_tile)",
    "- resident: layers that stay gathered (parallel.resident_blocks); replicas: copies of the base and GPUs per "
    "replica (parallel.shard_degree)",
    "- on the host: offloaded to host memory, and the host memory per node (parallel.offload_base)",
    "- no: memory needed with the current settings; `distlora plan` of one model and GPU says what would fit",
)
"""Explanation of a cell."""


def matrix(plans: Mapping[tuple[str, str], Plan | None]) -> Iterator[str]:
    """Yield a table of plans by (model, machine), a row per model; None: the settings are not possible there."""
    models, machines = (list(dict.fromkeys(key[place] for key in plans)) for place in (0, 1))
    rows = [[model, *(cell(plans[model, machine]) for machine in machines)] for model in models]
    yield Table("", ["", *machines], rows).markdown()
    yield ""
    yield from LEGEND


def cell(plan: Plan | None) -> str:
    """Return a plan in a cell: `17.4 GB, 1,210 tok/s: NF4, recompute layers, x 1`, or its need if it does not fit."""
    if plan is None:
        return "not possible"
    needed, usable = plan.device.total / 1e9, plan.machine.usable_bytes
    if plan.fits is False:
        return f"no: {needed:.1f} GB" + ("" if usable is None else f" of {usable / 1e9:.1f}")
    time = plan.time
    speed = "" if time is None else f", {time.tokens_per_second:,.0f} tok/s"
    return f"{needed:.1f} GB{speed}: {', '.join(how(plan))}"


def how(plan: Plan) -> Iterator[str]:
    """Yield the settings that a plan fits with, in a few words each."""
    config = plan.config
    train, parallel = config.train, config.parallel
    yield "full" if config.adapter.method == "full" else BASES[config.quant.method]
    yield RECOMPUTED[train.checkpointing]
    yield f"x {train.micro_batch}"
    if train.accumulate == "block":
        yield "slices"
    if train.mlp_tile is not None:
        yield f"tiles of {train.mlp_tile:,}"
    if parallel.offload_base or train.checkpointing == "offload":
        what = ["base"] * parallel.offload_base + ["inputs"] * (train.checkpointing == "offload")
        yield f"{' and '.join(what)} on the host ({size(plan.host.machine)})"
    if parallel.resident_blocks:
        yield f"{parallel.resident_blocks} resident"
    if plan.work.expert_degree > 1:
        yield f"experts over {plan.work.expert_degree}"
    if plan.traffic.shards < plan.machine.ranks:
        yield f"{plan.machine.ranks // plan.traffic.shards} replicas of {plan.traffic.shards}"


def scaling_tables(rows: Sequence[ScalingRow]) -> Iterator[str]:
    """Yield a table per fabric: a row per number of GPUs, the ways to shard the base side by side, the assumptions."""
    for fabric in dict.fromkeys(row.fabric for row in rows):
        of_fabric = [row for row in rows if row.fabric == fabric]
        layouts = list(dict.fromkeys(row.layout for row in of_fabric))
        by_place = {(row.ranks, row.layout): row for row in of_fabric}
        header = ["GPUs", "nodes", "sequences per step"]
        for layout in layouts:
            header += [f"{layout}: s per step", "tokens/s", "per GPU", "MFU", "waits for"]
        lines = []
        for ranks in dict.fromkeys(row.ranks for row in of_fabric):
            first = next(row for row in of_fabric if row.ranks == ranks)
            cells = [f"{ranks:,}", f"{first.machines:,}", f"{first.rows:,}"]
            for layout in layouts:
                cells += _scaling_cells(by_place.get((ranks, layout)))
            lines.append(cells)
        yield f"over {'the links of the node' if fabric == OWN else fabric}:"
        yield ""
        yield Table("", header, lines).markdown()
        yield ""
    yield "Assumptions:"
    yield from (f"- {each}" for each in dict.fromkeys(each for row in rows for each in row.assumptions))


LEVERED = (1, 8, 64, 512)
"""GPUs whose leverage a table shows."""


def leverage_table(rows: Sequence[ScalingRow]) -> Iterator[str]:
    """Yield the fraction of tokens/s that remains if an assumed rate is halved, largest effect first."""
    shown = [row for row in rows if row.fabric == OWN and row.layout == "one replica" and row.ranks in LEVERED]
    levers = sorted(shown[0].if_half, key=lambda lever: min(row.if_half[lever] for row in shown))
    header = ["half of the rate", *(f"{row.ranks:,} GPU{'s' if row.ranks > 1 else ''}" for row in shown)]
    yield "Fraction of the tokens/s of one replica that remains if one rate is half of the assumed one:"
    yield ""
    rates = [[lever, *(f"{row.if_half[lever]:.0%}" for row in shown)] for lever in levers]
    yield Table("", header, rates).markdown()


def _scaling_cells(row: ScalingRow | None) -> list[str]:
    if row is None:
        return [""] * 5
    fits = "" if row.fits is not False else " (does not fit)"
    return [
        f"{row.seconds:,.0f}{fits}" if row.seconds >= 100 else f"{row.seconds:.3g}{fits}",
        f"{row.tokens_per_second:,.0f}",
        f"{row.tokens_of_a_rank:,.0f} ({row.efficiency:.0%})",
        f"{row.mfu:.0%}",
        WAITS[row.binds],
    ]


_STYLES: dict[str, Style] = {"one replica": "line points", "replica per node": "dashed points"}


def plot_scaling(rows: Sequence[ScalingRow], title: str, path: Path) -> None:
    """Draw a line for each fabric and each way to shard the base."""
    fabrics, numbers = (
        list(dict.fromkeys(values)) for values in zip(*((row.fabric, row.ranks) for row in rows), strict=True)
    )
    curves = []
    for layout, fabric in dict.fromkeys((row.layout, row.fabric) for row in rows):
        own = [row for row in rows if (row.layout, row.fabric) == (layout, fabric)]
        x, y = [numbers.index(row.ranks) for row in own], [row.tokens_of_a_rank for row in own]
        colour = fabrics.index(fabric)
        curves.append(Curve(name=f"{layout}, {fabric}", x=x, y=y, style=_STYLES[layout], colour=colour))
    words = [f"{number:,}" for number in numbers]
    figure = Figure(
        title="tokens/s per GPU", x_name="GPUs", x_words=words, curves=curves, y_scale="linear", from_zero=True
    )
    save_png([figure], path, title=title)


def plot_memory(plans: Mapping[str, Plan], title: str, path: Path) -> None:
    """Draw a bar per plan, of its memory by category in GB (1e9 bytes) on the available memory."""
    rows = {
        name: {KINDS[kind]: plan.device.by_kind.get(kind, 0) / 1e9 for kind in KINDS} for name, plan in plans.items()
    }
    usable = {name: plan.machine.usable_bytes for name, plan in plans.items()}
    limits = {name: nbytes / 1e9 for name, nbytes in usable.items() if nbytes is not None}
    save_stacked_bars(rows, limits, path, title=title, x_name="peak memory per rank in GB; grey: available")
