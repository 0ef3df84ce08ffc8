"""The nodes that a run is planned for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from distlora.config import ClusterConfig, GpuConfig
from distlora.config.plan import CONTEXT_BYTES, GPUS, Gpu, find_gpu

GIB = 2**30
RATES = ("tflops", "memory_gb_per_second", "link_gb_per_second", "host_gb_per_second", "network_gb_per_second")
"""Settings of `gpu` that are rates."""
KEPT_BY_DRIVER = 0.02
"""Fraction of the driver's figure that CUDA does not hand out: 0.4 to 2 % on the GPUs of the table."""
ANOTHER_SIZE = 0.05
"""Relative difference from the table's memory from which a GPU is a variant: an H100 with 96 GB, an RTX 4090 with
48 GB, an A40 without ECC."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalHardware:
    """The hardware of this node."""

    devices: tuple[tuple[str, int], ...] | None = ()
    """(name, bytes of memory) of each usable GPU by its driver, in CUDA's order, or the largest first if that is
    unknown. None if there are GPUs that the driver does not describe."""
    host_bytes: int | None = None
    """Available host memory in bytes (`distlora.system.host_memory.available_bytes`); None if unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Nodes that are all alike. Rates are in bytes per second, in one direction."""

    name: str
    """`RTX 4090 24 GB`, `RTX 4090, 48 GiB` if its memory differs from the table, `a GPU of 24 GiB`, or `CPU`."""
    is_gpu: bool
    gpu: Gpu | None
    """Entry in the table; None for a CPU or an unknown GPU."""
    usable_bytes: int | None
    """Available bytes per rank: of its GPU, or its share of a CPU node's memory; None if unknown."""
    host_bytes: int | None
    """Available host memory per node in bytes; None if unknown."""
    ranks: int
    """Ranks of all nodes."""
    ranks_per_machine: int
    flops: float | None
    """Dense bf16 operations per second; None if unknown, and then no time is planned."""
    bandwidth: float | None
    link: float | None
    """Rate into a GPU from the others of its node."""
    host_link: float | None
    network: float | None
    """Rate into a node from the others."""
    has_nvlink: bool | None = None
    """True if `link` is NVLink among all GPUs of a node; None if unknown."""
    measured: frozenset[str] = frozenset()
    """Rates that the user gave, by their settings in `gpu`; plans assume that a run reaches them."""
    price_per_hour: float | None = None
    """Price of one GPU per hour."""

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the GPU; (0, 0) if unknown."""
        return (0, 0) if self.gpu is None else self.gpu.capability


def machine_of(spec: GpuConfig, cluster: ClusterConfig, *, found: LocalHardware | None = None) -> Machine:
    """Return the nodes of a run: with the GPU that `gpu=` names, else with the hardware of this node (`found`).

    Without `found`, nothing is assumed of nodes that SLURM or other commands start, except that their ranks have GPUs.
    Settings in `gpu` override the table, or describe a GPU that is not in it.
    """
    here = found or LocalHardware()
    gpu, name, memory = _gpu(spec, cluster, here)
    is_gpu = memory is not None or here.devices is None or (found is None and cluster.launcher != "local")
    usable = None if memory is None else memory - CONTEXT_BYTES
    if not is_gpu and here.host_bytes is not None:  # Ranks on a CPU share the host memory.
        usable = here.host_bytes // cluster.gpus_per_node
    is_here = is_of(spec, here)
    return Machine(
        name=name or ("a GPU" if is_gpu else "CPU"),
        is_gpu=is_gpu,
        gpu=gpu,
        usable_bytes=usable,
        host_bytes=here.host_bytes if is_here else None,
        ranks=cluster.ranks,
        ranks_per_machine=cluster.gpus_per_node,
        flops=_given_or(spec.tflops, 1e12, None if gpu is None else gpu.flops),
        bandwidth=_given_or(spec.memory_gb_per_second, 1e9, None if gpu is None else gpu.bandwidth),
        link=_given_or(spec.link_gb_per_second, 1e9, None if gpu is None else gpu.link),
        host_link=_given_or(spec.host_gb_per_second, 1e9, None if gpu is None else gpu.host_link),
        network=_given_or(spec.network_gb_per_second, 1e9, None if gpu is None else gpu.network),
        has_nvlink=None if gpu is None else gpu.has_nvlink,
        measured=frozenset(name for name in RATES if getattr(spec, name) is not None),
        price_per_hour=spec.price_per_hour,
    )


def is_of(spec: GpuConfig, here: LocalHardware) -> bool:
    """Return True if a run is for this node: `gpu=` names no GPU, or one that is here."""
    named = GPUS.get(spec.name)
    return named is None or any(find_gpu(device) == named for device, _ in here.devices or ())


def used_device(cluster: ClusterConfig, here: LocalHardware) -> tuple[str, int] | None:
    """Return (name, bytes of memory) of the smallest GPU that ranks use, since shards are equal; None if unknown."""
    used = (here.devices or ())[: cluster.gpus_per_node]
    return min(used, key=lambda gpu: gpu[1], default=None)


def _gpu(spec: GpuConfig, cluster: ClusterConfig, here: LocalHardware) -> tuple[Gpu | None, str, int | None]:
    """Return (known GPU, name, bytes of memory) of the named GPU, else of the one here; no name for a CPU."""
    named, given = GPUS.get(spec.name), spec.memory_gib
    device = used_device(cluster, here) if named is None else None
    gpu = named if device is None else find_gpu(device[0])
    if given is not None:
        memory = int(given * GIB)
    elif device is not None:
        memory = device[1] if gpu is None else handed_out(gpu, device[1])
    elif gpu is not None:
        memory = gpu.memory_bytes
    else:
        return None, "", None
    gib = f"{memory / GIB:.3g} GiB" if given is None else f"{given:g} GiB"
    if gpu is None:
        return None, f"a GPU of {gib}" if device is None else f"{device[0]}, {gib}", memory
    is_as_listed = abs(memory - gpu.memory_bytes) <= ANOTHER_SIZE * gpu.memory_bytes
    return gpu, gpu.title if is_as_listed else f"{gpu.title.rsplit(maxsplit=2)[0]}, {gib}", memory


def handed_out(gpu: Gpu, shown: int) -> int:
    """Return the bytes that CUDA hands out of a GPU whose driver shows `shown` bytes.

    That is the table's figure, unless the GPU has less, or is a variant with more memory.
    """
    more = shown > (1 + ANOTHER_SIZE) * gpu.memory_bytes
    return int(shown * (1 - KEPT_BY_DRIVER)) if more else min(shown, gpu.memory_bytes)


def _given_or(given: float | None, unit: float, table: float | None) -> float | None:
    """Return the given value in bytes or operations per second, else the table's."""
    return table if given is None else given * unit
