"""Sharding of the base, its gathering, and the reduction of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distlora.config.errors import require, require_choice, require_positive

RESIDENCY_RESERVE = {"cuda": 0.1, "cpu": 0.5}
"""Reserve with resident_blocks=auto: of a device's memory (a GPU's all, the CPU's free), what stays free for what a
first step does not show, evaluations' and samples' memory, fragments, other processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Sharding of the base and reduction of gradients."""

    backend: Literal["fsdp2", "zero3"] = "fsdp2"
    """Backend that shards the frozen base over the ranks: PyTorch's FSDP2, or DeepSpeed's ZeRO-3, which can also keep
    it in host memory. The numbers are the same. One process needs no sharding and gets none."""
    shard_degree: int | Literal["node"] | None = None
    """Ranks per replica of the base. Each group of this many ranks shards one full replica; only gradients cross groups
    (HSDP). null: one replica over all ranks. `node`: one per node (cluster.gpus_per_node). 1: no sharding. A rank's
    memory for the base is 1/shard_degree of it."""
    offload_base: bool = False
    """Keep each rank's shard of the base in pinned host memory; needs parallel=zero3. A GPU then holds up to three
    layers' weights, or two and the LM head's. Each gather copies the rank's shard over PCIe while the layer before
    computes."""
    deepspeed_config: str | None = None
    """JSON file of DeepSpeed's own settings for parallel=zero3: how far ahead it gathers, what it keeps gathered."""
    prefetch: bool = True
    """Gather the next decoder layer while this one computes. Two layers are then resident instead of one."""
    resident_blocks: int | Literal["auto"] = 0
    """Number of first decoder layers that stay gathered after their first gather. Each takes a whole layer's bytes on
    every rank and causes no more traffic. `auto`: as many as fit into the memory that the first step leaves free, less
    a reserve. Results do not depend on it."""
    bucket_mb: float = 4.0
    """MiB of adapter gradients in one all-reduce. Smaller buckets overlap earlier and cost more launches."""

    def __post_init__(self) -> None:
        require_choice("parallel.backend", self.backend, ("fsdp2", "zero3"))
        require(
            self.backend == "zero3" or not self.offload_base,
            "parallel.offload_base=true is DeepSpeed's: FSDP2 keeps its shards where they are computed with; add "
            "parallel=zero3",
        )
        require(
            self.backend == "zero3" or self.deepspeed_config is None,
            f"parallel.deepspeed_config={self.deepspeed_config} has no effect with parallel.backend={self.backend}; "
            "add parallel=zero3, or leave it out",
        )
        require(
            self.shard_degree in (None, "node") or (isinstance(self.shard_degree, int) and self.shard_degree > 0),
            f"parallel.shard_degree={self.shard_degree} is no number of ranks; set it to 1 or more, to node (the ranks "
            "of a machine), or to null (all ranks)",
        )
        require(
            self.resident_blocks == "auto" or (isinstance(self.resident_blocks, int) and self.resident_blocks >= 0),
            f"parallel.resident_blocks={self.resident_blocks} is no number of blocks; set it to 0 or more, or to auto "
            "(as many as fit)",
        )
        require(
            self.backend == "fsdp2" or self.resident_blocks == 0,
            f"parallel.resident_blocks={self.resident_blocks} is FSDP2's: DeepSpeed keeps small tensors "
            "gathered, by stage3_param_persistence_threshold of parallel.deepspeed_config; leave it out, or set "
            "parallel=fsdp2",
        )
        require_positive("parallel", self, "bucket_mb")

    def check_blocks(self, num_blocks: int) -> None:
        """Refuse what a model of so many decoder blocks has not."""
        count = self.resident_blocks
        require(
            isinstance(count, str) or count <= num_blocks,
            f"parallel.resident_blocks={count} is more than the {num_blocks:,} blocks of this model; set "
            f"parallel.resident_blocks={num_blocks}, or auto (as many as fit)",
        )
