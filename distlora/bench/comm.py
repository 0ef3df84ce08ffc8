"""What a step moves between ranks, ours beside PEFT with accelerate's FSDP2: calculated for any model from its
config.json, and counted on two ranks of a small one. Imports no torch; `distlora bench comm` prints it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distlora.architecture.shapes import ModelShapes
from distlora.config import Config, require
from distlora.planner import traffic
from distlora.planner.traffic import StepBytes
from distlora.system import numbers

MODELS = {
    "Llama 3.1 8B": "meta-llama/Llama-3.1-8B",
    "Llama 3.1 70B": "meta-llama/Llama-3.1-70B",
    "Llama 3.1 405B": "meta-llama/Llama-3.1-405B",
}
"""What is calculated where no model is named, by its name in distlora.architecture.known."""

SMALL: dict[str, Any] = {
    "vocab_size": 1001,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
}
"""The Llama that is measured: sizes that the ranks do not divide; bitsandbytes' CPU kernels need rows of whole 64s."""

MACHINE = 8
"""Ranks of a machine, where there are more and no setting says how many."""

PEERS: dict[traffic.Storage, str] = {
    "nf4 in bf16": "PEFT + accelerate FSDP2, NF4 stored as bf16",
    "nf4 in uint8": "PEFT + accelerate FSDP2, NF4 stored as uint8",
    "bf16": "PEFT + accelerate FSDP2, bf16",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One way to train a model, and what a step of it moves on each rank."""

    model: str
    ranks: int
    machine: int
    """Ranks of a machine, where there are more."""
    accumulation: int
    """Micro-batches of a step on each rank."""
    who: str
    step: StepBytes
    held: int
    """Bytes of the base that a rank keeps."""

    def as_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        step = self.step
        return values | {"received": step.received, "into_a_machine": step.into_machine(self.machine)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """A step on real ranks, by an independent counter."""

    who: str
    accumulation: int
    gathered: int
    scattered: int
    reduced: int
    by_backend: dict[str, int] | None
    """What our backend counts itself; None for a peer."""
    loopback: int | None
    """Bytes that came in over the ranks' own network, all ranks together; None where others use it too."""


def rows_of(
    name: str, shapes: ModelShapes, config: Config, *, ranks: int, accumulation: int, machine: int = MACHINE
) -> Iterator[Row]:
    """Ours with these settings, by either way to accumulate, on several machines with a copy of the base on each too,
    and the peers with the same adapters. `machine`: the ranks that a machine has room for."""
    itemsize = traffic.DTYPE_BYTES[config.train.dtype]
    quantized = config.quant.is_nf4
    for ours in variants(config, ranks, machine):
        step = traffic.ours(ours, shapes, world=ranks, accumulation=accumulation)
        held = traffic.held_bytes(shapes, step.shards, quantized=quantized, itemsize=itemsize)
        block = traffic.block_bytes(shapes.block, step.shards, quantized=quantized, itemsize=itemsize)
        held += (shapes.num_layers - traffic.moved_blocks(ours, shapes)) * block
        yield Row(name, ranks, machine, accumulation, our_name(ours), step, held)
    if config.adapter.method == "lora" and not config.adapter.modules_to_save:
        adapters = shapes.adapters(config.adapter)
        for storage, who in PEERS.items():
            step = traffic.peer(shapes, adapters, storage, world=ranks, accumulation=accumulation)
            yield Row(
                name, ranks, machine, accumulation, who, step, traffic.peer_held_bytes(shapes, storage, world=ranks)
            )


def variants(config: Config, ranks: int, machine: int) -> Iterator[Config]:
    """The settings that ours is calculated with, as a run of so many ranks has them, on machines of `machine`. Raises
    UserError where its own cannot be."""
    cluster = dataclasses.replace(config.cluster, launcher="local", nodes=1, gpus_per_node=ranks)
    parallel = config.parallel
    if parallel.shard_degree == "node":
        node = min(machine, ranks)
        require(
            ranks % node == 0,
            f"parallel.shard_degree=node is a copy of the base on each machine, and --ranks {ranks} are no number of "
            f"machines of {node}; write a multiple of {node}, or set cluster.gpus_per_node to what a machine has",
        )
        parallel = dataclasses.replace(parallel, shard_degree=node)
    accumulates: tuple[Literal["step", "block"], ...] = ("step", "block")
    for accumulate in accumulates:
        train = dataclasses.replace(config.train, accumulate=accumulate)
        yield dataclasses.replace(config, cluster=cluster, parallel=parallel, train=train)
    if parallel.shard_degree is None and ranks > machine > 1 and ranks % machine == 0:
        parallel = dataclasses.replace(parallel, shard_degree=machine)
        yield dataclasses.replace(config, cluster=cluster, parallel=parallel, train=train)


def our_name(config: Config) -> str:
    base = "NF4" if config.quant.is_nf4 else "bf16"
    name = f"distlora, {'everything trained' if config.adapter.method == 'full' else base}"
    parallel = config.parallel
    name += ", ZeRO-3" if parallel.backend == "zero3" else ""
    name += f", accumulate={config.train.accumulate}"
    name += f", shard_degree={parallel.shard_degree}" if parallel.shard_degree else ""
    return name + (f", resident_blocks={parallel.resident_blocks}" if parallel.resident_blocks else "")


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: a table for each model and number of ranks."""
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.ranks, row.machine), []).append(row)
    for (model, ranks, machine), members in groups.items():
        several = ranks > machine
        yield (
            f"| {model}, {ranks} ranks | micro-batches | gathered | scattered | reduced | received a rank | beside the "
            f"first |{f' into a machine of {machine} |' if several else ''} of the base on each rank |"
        )
        yield "|---" * (9 if several else 8) + "|"
        first: Mapping[int, Row] = {row.accumulation: row for row in reversed(members)}
        for row in members:
            step, whole = row.step, first[row.accumulation].step.received
            cells = (
                *(row.who, str(row.accumulation), size(step.gathered), size(step.scattered), size(step.reduced)),
                *(size(step.received), f"{step.received / whole:.2f}" if whole else ""),
                *((size(step.into_machine(machine)),) if several else ()),
                size(row.held),
            )
            yield f"| {' | '.join(cells)} |"
        yield ""


def counted_table(rows: Sequence[Row], counted: Sequence[Counted]) -> Iterator[str]:
    """Markdown: the same steps, calculated and counted."""
    alone = any(each.loopback is not None for each in counted)
    extra = " received a rank: calculated, over the network |" if alone else ""
    yield (
        "| counted on 2 ranks, MB | micro-batches | gathered | scattered | reduced | calculated | our backend's own "
        f"count |{extra}"
    )
    yield "|---|---|---|---|---|---|---|" + ("---|" if alone else "")
    for row in rows:
        each = next(c for c in counted if (c.who, c.accumulation) == (row.who, row.accumulation))
        carried = (each.gathered, each.scattered, each.reduced)
        calculated = (row.step.gathered, row.step.scattered, row.step.reduced)
        said = "" if each.by_backend is None else agreement(carried, tuple(each.by_backend.values()))
        cells = [row.who, str(row.accumulation), *(f"{nbytes / 1e6:.3f}" for nbytes in carried)]
        cells += [agreement(carried, calculated), said]
        if alone:
            assert each.loopback is not None
            cells.append(f"{row.step.received / 1e6:.3f}, {each.loopback / row.ranks / 1e6:.3f}")
        yield f"| {' | '.join(cells)} |"


def agreement(counted: tuple[int, ...], other: tuple[int, ...]) -> str:
    """`equal`, or by how much the sums differ."""
    if counted == other:
        return "equal"
    return f"{sum(other) / max(sum(counted), 1) - 1:+.2%} (differs: {', '.join(map(str, other))})"


def size(nbytes: int) -> str:
    """Three digits and a unit of 1000s; no unit of nothing."""
    return numbers.size(nbytes) if nbytes else "0"
