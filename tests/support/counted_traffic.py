"""The traffic that the formula has for a run."""

from __future__ import annotations

from distlora.config import Config
from distlora.parallel import Ranks
from distlora.parallel.ranks import Traffic
from support.counted_step import Counts, measure_ours, only_collectives


def our_traffic(ranks: Ranks, *, config: Config, accumulation: int) -> tuple[Counts, Traffic]:
    with only_collectives():
        return measure_ours(config, ranks, accumulation=accumulation)
