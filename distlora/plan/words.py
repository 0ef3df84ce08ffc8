"""How people read what is planned: kinds of memory by name, bytes and numbers by three digits. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from distlora.plan.kinds import Kind

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
