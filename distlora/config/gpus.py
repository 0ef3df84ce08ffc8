"""Describe known GPUs: memory, rates and links from the makers' data sheets (gpus.toml). Imports no torch."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib import resources

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
