"""The machines that a run is planned for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from distlora.cards import Card


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Machines that are all alike. Rates in bytes a second, in one direction."""

    name: str
    """`RTX 4090 24 GB`, or `CPU`."""
    is_gpu: bool
    card: Card | None
    """None: a CPU, or a card that is not in the table."""
    usable_bytes: int | None
    """What one rank can have on its device: of a card, or its share of a CPU machine's memory; None: not known."""
    host_bytes: int | None
    """Host memory of a machine that can be had; None: not known."""
    ranks: int
    """In all."""
    ranks_per_machine: int
    flops: float | None
    """Dense bf16 operations a second; None: not known, and so no time is said."""
    bandwidth: float | None
    link: float | None
    """Into a card from the others of its machine."""
    host_link: float | None
    network: float | None
    """Into a machine from the others."""
    price_per_hour: float | None = None
    """Of one card."""
