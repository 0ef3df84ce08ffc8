"""How the base is cut over ranks, how it is gathered, and how gradients travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distlora.config.errors import require, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    backend: Literal["fsdp2"] = "fsdp2"
    """What shards the frozen base over the ranks. One process needs no sharding and gets none."""
    prefetch: bool = True
    """Gather the next block while this one computes. Two blocks are then resident instead of one."""
    bucket_mb: float = 4.0
    """MiB of adapter gradients in one all-reduce. Smaller buckets overlap earlier and cost more launches."""

    def __post_init__(self) -> None:
        require(
            self.backend == "fsdp2", f"parallel.backend={self.backend!r} is not available; set parallel.backend=fsdp2"
        )
        require_positive("parallel", self, "bucket_mb")
