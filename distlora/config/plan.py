"""Known GPUs (gpus.toml, by data sheets), and the settings of the planner and its GPU."""

import math
import re
import tomllib
from dataclasses import dataclass, fields
from importlib import resources
from typing import Literal

from distlora.config.errors import Refusals, require_choice

CONTEXT_BYTES = int(0.6 * 2**30)
"""Device memory that CUDA's context and libraries take beside torch's allocator."""

PCIE_4, PCIE_5 = 31.5e9, 63e9
"""Bytes per second in one direction over 16 lanes."""
_NOT_WHOLE = r"Laptop|Max-Q|\bMIG\b|\bGRID\b|-\d+[ABCQ]\b"
"""Laptop GPUs, slices of a GPU and virtual GPUs carry the name of a faster GPU in their names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU by its data sheet; gpus.toml explains the figures. Rates are in bytes and operations per second."""

    name: str
    """Value of `gpu=`."""
    title: str
    """Name in tables."""
    pattern: str
    """Regular expression that matches the device name of this GPU only."""
    capability: tuple[int, int]
    """Compute capability."""
    processors: int
    """Number of streaming multiprocessors."""
    memory_bytes: int
    """Total memory as CUDA reports it, the least among drivers."""
    flops: float
    """Dense bf16 operations per second with fp32 accumulation."""
    bandwidth: float
    """Device memory bandwidth."""
    link: float
    """Rate from the other GPUs of its node, in one direction."""
    has_nvlink: bool = False
    """True where NVLink connects all GPUs of a node."""
    host_link: float
    """Rate between GPU and host, in one direction."""
    network: float
    """Rate into a node of such GPUs from other nodes."""

    @property
    def usable_bytes(self) -> int:
        """Device memory available to a process."""
        return self.memory_bytes - CONTEXT_BYTES


def _read() -> dict[str, Gpu]:
    table = tomllib.loads(resources.files("distlora.config").joinpath("gpus.toml").read_text(encoding="utf-8"))
    return {
        name: Gpu(
            name=name,
            memory_bytes=row.pop("memory_mib") * 2**20,
            capability=tuple(row.pop("capability")),
            **row,
        )
        for name, row in table.items()
    }


GPUS = _read()
"""The known GPUs by name."""


def find_gpu(device: str) -> Gpu | None:
    """Return the GPU with this device name (`NVIDIA H100 80GB HBM3`), or None for one that is not in the table."""
    if re.search(_NOT_WHOLE, device):
        return None
    return next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, device)), None)


CHOSEN = (
    "quant.method",
    "parallel.backend",
    "parallel.offload_base",
    "parallel.shard_degree",
    "parallel.expert_degree",
    "parallel.prefetch",
    "train.accumulate",
    "train.micro_batch",
    "train.checkpointing",
    "train.mlp_tile",
    "quant.dense_layers",
    "parallel.resident_blocks",
)
"""The settings that plan=auto may choose, in the order of the report; quant.method only if it is auto."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuConfig:
    """The GPU that a run is planned for: a known one, with corrections, or the figures of another."""

    name: str = "auto"
    """A known GPU (distlora/config/gpus.toml), or `auto` for the GPU of this node, or its CPU if it has none. Jobs that
    SLURM starts on other nodes have to name theirs."""
    memory_gib: float | None = None
    """Device memory in GiB; null for the table's figure."""
    tflops: float | None = None
    """Dense bf16 operations with fp32 accumulation, in 1e12 per second. The plan assumes that matrix products reach
    this rate, so give a measured one; products measured so far reach 78-87 % of the table's figure."""
    memory_gb_per_second: float | None = None
    """Device memory bandwidth in 1e9 bytes per second."""
    link_gb_per_second: float | None = None
    """Rate from the other GPUs of the node in one direction (NVLink or PCIe), in 1e9 bytes per second."""
    host_gb_per_second: float | None = None
    """Rate between GPU and host in one direction, in 1e9 bytes per second."""
    network_gb_per_second: float | None = None
    """Rate into a node from other nodes in one direction, over all its network adapters, in 1e9 bytes per second; null
    for the table's figure for nodes with this GPU."""
    price_per_hour: float | None = None
    """Price of one GPU per hour in any currency; null to report no cost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """Settings of the planner: what it may choose, and whether a run that does not fit is refused."""

    mode: Literal["given", "auto"] = "given"
    """`given`: plan the settings as they are, and refuse a run that cannot fit. `auto`: choose the fastest settings
    that fit, among those that neither the command line nor the recipe sets."""
    refuse: bool = True
    """Refuse a run that does not fit by calculation; false: warn and start. A resume after a checkpoint only warns."""
    measure: bool = True
    """Measure the memory of one early step by category, and log where the peak differs by over 5 % and
    64 MB from the plan."""
    tokens: int | None = None
    """Total training tokens, for planned hours and cost if train.max_steps is not set; data that is not prepared has no
    known length."""


def refused_in_gpu(gpu: GpuConfig) -> Refusals:
    """Check the figures of the GPU."""
    require_choice("gpu.name", gpu.name, ("auto", *GPUS))
    for item in fields(gpu):
        value = getattr(gpu, item.name)
        if item.name != "name" and value is not None and not 0 < value < math.inf:
            yield f"{item.name}= is not above 0; set a positive number, or leave it out"


def refused_in_plan(plan: PlanConfig) -> Refusals:
    """Check the planned length."""
    if plan.tokens is not None and plan.tokens <= 0:
        yield "tokens= is not a valid number of tokens; set {field}=10000000, or leave it out"
