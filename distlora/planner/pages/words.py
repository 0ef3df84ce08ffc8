"""Name the categories and moments of memory for people, and format parts that add up. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from distlora.planner.memory.kinds import Kind, Moment
from distlora.planner.speed.compute import FlopsKind
from distlora.planner.speed.seconds import Term
from distlora.system.numbers import size

Name = TypeVar("Name")

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
    "loading": "while adapters are made from the base's weights",
    "embedding": "while the embedding is read",
    "forward": "while a block is in its forward",
    "head": "while the head is in its forward",
    "head_backward": "while the head is in its backward",
    "block": "while a block is in its backward",
    "embedding_backward": "while the embedding is in its backward",
    "update": "while the optimizer updates",
}
WORK: Mapping[FlopsKind, str] = {
    "forward": "forward",
    "input_gradients": "gradients of inputs",
    "weight_gradients": "gradients of weights",
    "adapters": "adapters",
    "attention": "attention",
    "head": "head",
    "reference": "DPO's reference",
    "recomputation": "recomputation",
    "scores": "scores again",
    "masked": "pairs that a mask hides",
}
"""What each kind of operations is, for people."""
WAITS: Mapping[Term, str] = {
    "compute": "computing",
    "memory": "the GPU's memory",
    "launches": "launches",
    "link": "other GPUs",
    "network": "other machines",
    "host_link": "host memory",
    "latency": "the start of collectives",
}
"""What a step's seconds go to, or wait for, for people."""
SOURCES = {"folder": "its folder", "hub cache": "its config.json", "built in": "the table of known models"}
"""Where the sizes of a model come from."""
BASES = {"nf4": "NF4", "none": "bf16"}
"""What the base is kept in, by quant.method, in a word."""
RECOMPUTED = {
    "none": "recompute none",
    "selective": "recompute MLPs",
    "block": "recompute blocks",
    "offload": "recompute blocks",
}
"""What train.checkpointing runs again in backward."""


def largest(by_kind: Mapping[Kind, int], count: int = 3) -> str:
    """Return the largest categories: `4-bit weights of the base 17.1 GB, ...`."""
    kinds = sorted(by_kind.items(), key=lambda each: -each[1])[:count]
    return ", ".join(f"{KINDS[kind]} {size(nbytes)}" for kind, nbytes in kinds)


def rounded(parts: Mapping[Name, float], step: float) -> dict[Name, int]:
    """Each in whole steps, that add up to their sum in whole steps: those that lose most by it are rounded up."""
    found = {name: int(value // step) for name, value in parts.items()}
    left = round(sum(parts.values()) / step) - sum(found.values())
    for name in sorted(parts, key=lambda name: parts[name] % step, reverse=True)[:left]:
        found[name] += 1
    return found


def shares(parts: Mapping[Name, float]) -> list[tuple[Name, int]]:
    """Per cent of each, the largest first, 100 together; those of 0 are left out."""
    percents = rounded(parts, sum(parts.values()) / 100)
    ordered = sorted(percents.items(), key=lambda each: (-each[1], -parts[each[0]]))
    return [(name, percent) for name, percent in ordered if percent]
