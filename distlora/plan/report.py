"""A plan in words: a few lines at a run's start, and the page of `distlora plan`. Imports no torch.

GB are 1e9 bytes, as data sheets and disks have them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from distlora.config import Config
from distlora.plan import Plan
from distlora.plan.disk import trained_tensors
from distlora.plan.kinds import Kind, Moment

WIDTH = 100
"""Characters of a line."""
_LABEL, _BAR = 12, 40

KINDS: Mapping[Kind, str] = {
    "codes": "4-bit weights of the base",
    "scales": "their scales",
    "weights": "16-bit weights of the base",
    "embeddings": "embedding and head",
    "norms": "norms and biases",
    "resident": "blocks that stay gathered",
    "adapters": "what is trained, in fp32",
    "gradients": "its gradients",
    "optimizer": "the optimizer's moments",
    "scratch": "dequantized weights",
    "gathered": "gathered from other ranks",
    "kept": "activations kept for backward",
    "working": "activations of what runs",
    "logits": "logits and their gradients",
    "communication": "buffers of collectives",
    "slack": "slack of the allocator",
}
"""What each kind of memory is, for people."""
MOMENTS: Mapping[Moment, str] = {
    "loading": "while the base is read",
    "embedding": "while the embedding is read",
    "forward": "while a block is in its forward",
    "head": "while the head is in its forward",
    "head_backward": "while the head is in its backward",
    "block": "while a block is in its backward",
    "update": "while the optimizer updates",
    "evaluation": "in an evaluation",
}
SOURCES = {"folder": "its folder", "hub cache": "its config.json", "built in": "the table of known models"}
"""Where the sizes of a model come from."""


def lines(plan: Plan) -> list[str]:
    """What a run says of its plan before it starts: a few short lines."""
    device, host, disk = plan.device, plan.host, plan.disk
    card = "process" if not plan.machine.is_gpu else "card"
    usable = plan.machine.usable_bytes
    of = "" if usable is None else f" of {size(usable)}"
    fits = {True: "", False: ": it does NOT fit", None: ""}[plan.fits]
    largest = sorted(device.by_kind.items(), key=lambda item: -item[1])[:3]
    wire = plan.wire
    found = [
        f"plan: {size(device.total)}{of} a {card}{fits}, {MOMENTS[device.worst]}",
        "  most of it: " + ", ".join(f"{KINDS[kind]} {size(nbytes)}" for kind, nbytes in largest),
        f"  host memory: {size(host.while_loading)} a process while it loads, {size(host.while_training)} while it "
        f"trains, {size(host.machine)} on a machine",
        f"  disk: {size(disk.run)} for the run, a checkpoint {size(disk.checkpoint)}"
        + (f", {size(disk.cache)} for the quantized base" if disk.cache else ""),
    ]
    if wire.world > 1:
        found.append(f"  a step: {size(wire.received)} come into each {card} from the others")
    return found


def page(plan: Plan) -> str:
    """Everything that a person wants to know first, on one screen."""
    rows = [
        *_row("model", _model(plan)),
        *_row("trained", _trained(plan)),
        *_row("machine", _machine(plan)),
        *_row("fits", verdict(plan)),
        "",
        *_memory(plan),
        "",
        *_row("host memory", _host(plan)),
        *_row("disk", _disk(plan)),
        *_row("wire", _wire(plan)),
        *_row("settings", settings(plan.config)),
    ]
    return "\n".join(rows)


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much."""
    needed, usable = plan.device.total, plan.machine.usable_bytes
    what = "card" if plan.machine.is_gpu else "process"
    if usable is None:
        return f"nobody knows: it needs {size(needed)} a {what}, and how much there is was not said (card=NAME)"
    if plan.fits:
        return f"yes: {size(needed)} of {size(usable)} a {what}, {size(usable - needed)} to spare"
    return f"NO: it needs {size(needed)} a {what}, which has {size(usable)}: {size(needed - usable)} too much"


def size(nbytes: float) -> str:
    """Three digits and a unit of 1000s: `57.8 GB`."""
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def count(number: float) -> str:
    """`70.6 billion`."""
    for name, unit in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if number >= 0.9995 * unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,.0f}"


def _row(label: str, text: str) -> Iterator[str]:
    """A label and what is said, over as many lines as it takes."""
    whole = re.sub(r"(?<=\d) (?=[kMGTP]?B\b)", "\0", text)  # A number and its unit stay on one line.
    found = textwrap.wrap(whole, WIDTH - _LABEL, break_long_words=False, break_on_hyphens=False)
    for line in found or [""]:
        yield f"{label:<{_LABEL}}{line}".replace("\0", " ")
        label = ""


def _model(plan: Plan) -> str:
    shapes, model = plan.model.shapes, plan.model
    return (
        f"{model.name}: {count(shapes.numel)} parameters, {shapes.num_layers} blocks of {shapes.hidden:,}; sizes from "
        f"{SOURCES[model.source]}"
    ) + (f"; {model.note}" if model.note else "")


def _trained(plan: Plan) -> str:
    config, shapes = plan.config, plan.model.shapes
    trained = sum(tensor.numel for tensor in trained_tensors(config, shapes))
    share = f"{count(trained)} ({trained / shapes.numel:.2%})"
    base = {"nf4": "in 4 bits (NF4)", "none": f"in {'bf16' if config.train.dtype == 'bf16' else 'fp32'}"}
    if config.adapter.method == "full":
        return f"everything, {count(trained)} parameters; fp32 masters"
    targets = config.adapter.target_modules
    method = "DoRA" if config.adapter.use_dora else "LoRA"
    where = targets if isinstance(targets, str) else ", ".join(targets)
    return f"{method} of rank {config.adapter.r} on {where}: {share}; the base stays {base[config.quant.method]}"


def _machine(plan: Plan) -> str:
    machine = plan.machine
    machines = -(-machine.ranks // machine.ranks_per_machine)
    shards = plan.wire.shards
    what = f"{min(machine.ranks, machine.ranks_per_machine)} x {machine.name}"
    if not machine.is_gpu:
        processes = min(machine.ranks, machine.ranks_per_machine)
        what = f"this one's CPU, {processes} process{'es' if processes > 1 else ''} (card=NAME: another machine)"
    text = what if machines == 1 else f"{machines} machines of {what}"
    if machine.ranks == 1:
        return text
    if shards == 1:
        return f"{text}; the base whole on each"
    backend = {"fsdp2": "FSDP2", "zero3": "DeepSpeed ZeRO-3"}[plan.config.parallel.backend]
    if shards == machine.ranks:
        return f"{text}; {backend} cuts the base over all of them"
    return f"{text}; {backend} cuts the base over {shards} of them, {machine.ranks // shards} copies of it in all"


def _memory(plan: Plan) -> Iterator[str]:
    """Bytes by kind, each with a bar as long as its share of what there is."""
    device, usable = plan.device, plan.machine.usable_bytes
    whole = max(device.total, usable or 0)
    unit, scale = ("GB", 1e9) if whole >= 1e9 else ("MB", 1e6)
    what = "memory of a card" if plan.machine.is_gpu else "memory of a process for it"
    yield f"{what} at its peak, {MOMENTS[device.worst]} ({unit}):"
    place = 0
    width = max(len(KINDS[kind]) for kind in device.by_kind)
    for kind, nbytes in device.by_kind.items():
        start, end = round(_BAR * place / whole), round(_BAR * (place + nbytes) / whole)
        place += nbytes
        bar = " " * start + "#" * max(end - start, 1)
        yield f"  {KINDS[kind]:<{width}} {nbytes / scale:>8.2f}  |{bar:<{_BAR}.{_BAR}}|"
    end = round(_BAR * place / whole)
    bar = "#" * end + "." * (_BAR - end)
    yield f"  {'together':<{width}} {place / scale:>8.2f}  |{bar}|" + (
        "" if usable is None else f" of {usable / scale:.2f}"
    )


def _host(plan: Plan) -> str:
    host, machine = plan.host, plan.machine
    text = f"{size(host.while_loading)} a process while it loads, {size(host.while_training)} while it trains"
    kinds = {
        "the base": host.base,
        "the blocks' inputs": host.inputs,
        "paged moments": host.moments,
        "copies of what is saved": host.copies,
    }
    said = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in kinds.items() if nbytes)
    text += f" ({said})" if said else ""
    text += f"; {size(host.machine)} on a machine"
    return text + ("" if machine.host_bytes is None else f" of {size(machine.host_bytes)}")


def _disk(plan: Plan) -> str:
    disk = plan.disk
    text = f"{size(disk.base)} for the model"
    text += f", {size(disk.cache)} for its quantized shards" if disk.cache else ""
    return (
        f"{text}, {size(disk.run)} for the run: up to {disk.checkpoints_kept} checkpoints of {size(disk.checkpoint)}, "
        f"the result {size(disk.result)}"
    )


def _wire(plan: Plan) -> str:
    step, machine = plan.wire, plan.machine
    if step.world == 1:
        return "nothing: there is one process"
    text = (
        f"a step gathers {size(step.gathered)} and sums {size(step.reduced + step.scattered + step.reduced_rows)} on "
        f"each rank; {size(step.received)} come in"
    )
    if machine.ranks > machine.ranks_per_machine:
        text += f", {size(step.into_machine(machine.ranks_per_machine))} into a machine from the others"
    return text


def settings(config: Config) -> str:
    """Those that memory and time depend on, as the command line has them."""
    train, parallel = config.train, config.parallel
    values: dict[str, object] = {
        "quant": config.quant.method,
        "data.sequence_length": config.data.sequence_length,
        "train.micro_batch": train.micro_batch,
        "train.global_batch": train.global_batch,
        "train.checkpointing": train.checkpointing,
        "train.accumulate": train.accumulate,
        "train.mlp_tile": train.mlp_tile,
        "optim": config.optim.name,
        "parallel": parallel.backend,
        "parallel.shard_degree": parallel.shard_degree,
        "parallel.resident_blocks": parallel.resident_blocks,
        "parallel.offload_base": "true" if parallel.offload_base else None,
    }
    return " ".join(f"{name}={value}" for name, value in values.items() if value not in (None, 0))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table, its cells as wide as the widest of their column, so that it reads in a terminal too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for cells in (header, ["-" * width for width in widths], *rows):
        yield f"| {' | '.join(f'{cell:<{width}}' for cell, width in zip(cells, widths, strict=True))} |"
