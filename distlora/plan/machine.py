"""The machines that a run is planned for. Imports no torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from distlora.cards import CARDS, CONTEXT_BYTES, Card, card_named
from distlora.config import Config

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a machine has."""

    devices: tuple[tuple[str, int], ...] | None = ()
    """(name, bytes of memory) of each GPU that processes may use, as its driver says it; None: there are some, of which
    it does not say that."""
    host_bytes: int | None = None
    """Host memory that can be had (`distlora.host_memory.available_bytes`); None: not known."""


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
    has_liger: bool = True
    """Whether liger-kernel is installed: on other machines than this it is taken to be, as distlora[cuda] brings it."""


def machine_of(config: Config, *, found: Found | None = None) -> Machine:
    """The machines of a run: with the card that `card=` names, else what this machine has (`found`), where the run's
    processes are started here. Of machines that SLURM or torchrun starts on nothing is claimed without a name; their
    ranks are GPUs' all the same.

    `card.*` says better what the table says of a card, or all of one that is not in it.
    """
    local = config.cluster.launcher == "local"
    here = found if local and found is not None else Found()
    named = CARDS.get(config.card.name)
    card, name, memory = named, "", None if named is None else named.memory_bytes
    if named is not None:
        name = named.title
    elif here.devices:
        # Of cards that differ the smallest decides: ranks have the same share of the model.
        device, memory = min(here.devices, key=lambda each: each[1])
        card = card_named(device)
        name = f"{device} {memory / GIB:.0f} GB" if card is None else card.title
        # The driver counts what CUDA does not hand out.
        memory = memory if card is None else min(memory, card.memory_bytes)
    given = config.card
    if given.memory_gib is not None:
        memory = int(given.memory_gib * GIB)
    is_gpu = memory is not None or not local or here.devices is None
    usable = None if memory is None else memory - CONTEXT_BYTES
    # What a CPU's ranks have is the host's memory.
    if not is_gpu and here.host_bytes is not None:
        usable = here.host_bytes // config.cluster.gpus_per_node
    is_here = named is None or any(card_named(device) == named for device, _ in here.devices or ())
    return Machine(
        name=name or (("a card" if memory is None else f"a card of {memory / GIB:g} GiB") if is_gpu else "CPU"),
        is_gpu=is_gpu,
        card=card,
        usable_bytes=usable,
        host_bytes=here.host_bytes if is_here else None,
        ranks=config.cluster.ranks,
        ranks_per_machine=config.cluster.gpus_per_node,
        flops=_said(given.tflops, 1e12, None if card is None else card.flops),
        bandwidth=_said(given.memory_gb_per_second, 1e9, None if card is None else card.bandwidth),
        link=_said(given.link_gb_per_second, 1e9, None if card is None else card.link),
        host_link=_said(given.host_gb_per_second, 1e9, None if card is None else card.host_link),
        network=_said(given.network_gb_per_second, 1e9, None if card is None else card.network),
        price_per_hour=given.price_per_hour,
        has_liger=not (here.devices and is_here) or importlib.util.find_spec("liger_kernel") is not None,
    )


def _said(given: float | None, unit: float, table: float | None) -> float | None:
    """What the config says, else what the table does."""
    return table if given is None else given * unit
