"""What a run is planned for: the card it runs on, and what the planner may do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distlora.config.errors import require, require_choice
from distlora.config.gpus import CARDS

CHOSEN = (
    "quant.method",
    "parallel.backend",
    "parallel.offload_base",
    "parallel.shard_degree",
    "parallel.prefetch",
    "train.accumulate",
    "train.micro_batch",
    "train.checkpointing",
    "train.mlp_tile",
    "train.keep_dequantized",
    "parallel.resident_blocks",
)
"""The settings that plan=auto may choose, in the order in which they are said; quant.method where it is auto."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardConfig:
    """The card, or what of it differs from the table of known ones (distlora/config/gpus.py)."""

    name: str = "auto"
    """A known card (conf/card/), or `auto`: what this machine shows, its CPU where it has no card. What SLURM starts
    elsewhere has to be named."""
    memory_gib: float | None = None
    """Memory of a card in GiB; null: as the table says."""
    tflops: float | None = None
    """Dense bf16 operations, fp32 accumulation, in 1e12 a second. Time is planned as if products reached all of it, so
    it should be measured; of the table's figure 78 to 87 %."""
    memory_gb_per_second: float | None = None
    """What its memory delivers, in 1e9 bytes a second."""
    link_gb_per_second: float | None = None
    """What comes in from the other cards of the machine, in one direction: NVLink, or PCIe."""
    host_gb_per_second: float | None = None
    """PCIe in one direction."""
    network_gb_per_second: float | None = None
    """What comes into a machine from the others, in one direction, all its network adapters together; null: as the
    table says of machines with this card."""
    price_per_hour: float | None = None
    """Of one card, in any currency; null: no cost is said."""

    def __post_init__(self) -> None:
        require_choice("card.name", self.name, ("auto", *CARDS))
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            require(
                name == "name" or value is None or 0 < value < math.inf,
                f"card.{name}={value} is no figure above 0; set it to one, or leave it out",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    mode: Literal["given", "auto"] = "given"
    """`given`: say what the settings as they are need, and refuse what cannot fit. `auto`: choose the settings that
    memory and time depend on, wherever the command line and the recipe leave them at their defaults, to be the fastest
    that fit."""
    refuse: bool = True
    """Refuse a run that does not fit by calculation; false: say so and start it all the same, as what has run before
    and saved something is."""
    measure: bool = True
    """Measure the memory of one early step by kind, and say where it is over 5 % from the plan."""
    tokens: int | None = None
    """Tokens of the whole run, for its hours and their cost, where train.max_steps does not say how long it is: of data
    that is not prepared yet nobody knows."""

    def __post_init__(self) -> None:
        require_choice("plan.mode", self.mode, ("given", "auto"))
        require(
            self.tokens is None or self.tokens > 0,
            f"plan.tokens={self.tokens} is no number of tokens; set plan.tokens=10000000, or leave it out",
        )
