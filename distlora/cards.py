"""What cards can do, from their makers' data sheets: memory, rates, links. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

CONTEXT_BYTES = int(0.6 * 2**30)
"""What CUDA's context and libraries take of a card beside torch's allocator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A GPU. Rates are the makers', in bytes and operations a second."""

    name: str
    """As `card=` has it."""
    title: str
    pattern: str
    """What the device's own name has in it, as a regular expression."""
    memory_bytes: int
    flops: float
    """Dense bf16 with fp32 accumulation."""
    bandwidth: float
    """Of its memory."""
    link: float
    """Into it from the other cards of the machine, in one direction."""
    has_nvlink: bool
    host_link: float
    """Between it and the host, in one direction."""
    network: float
    """Into a machine of such cards from other machines, in one direction, as such machines usually are."""

    @property
    def usable_bytes(self) -> int:
        """What a process can have of its memory."""
        return self.memory_bytes - CONTEXT_BYTES


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card(
            name="h100",
            title="H100 SXM 80 GB",
            pattern=r"\bH100\b",
            memory_bytes=80 * 2**30,
            flops=989e12,
            bandwidth=3.35e12,
            link=450e9,
            has_nvlink=True,
            host_link=55e9,
            network=400e9,
        ),
        Card(
            name="rtx4090",
            title="RTX 4090 24 GB",
            pattern=r"\bRTX 4090\b(?! Laptop)",
            memory_bytes=24 * 2**30,
            flops=165e12,
            bandwidth=1.008e12,
            link=25e9,
            has_nvlink=False,
            host_link=25e9,
            network=12.5e9,
        ),
    )
}


def card_named(device: str) -> Card | None:
    """By the device's own name (`NVIDIA H100 80GB HBM3`); None for one that is not in the table."""
    return next((card for card in CARDS.values() if re.search(card.pattern, device)), None)
