"""Memory on the host: of each process while it loads and while it trains, and of a machine. Imports no torch.

What counts is anonymous memory, which a job's limit counts and nothing can drop; file pages come and go.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

from distlora.architecture.shapes import Asked
from distlora.config import AdapterConfig, ParallelConfig
from distlora.config.base import PLAIN
from distlora.config.deepspeed_file import offloads_base
from distlora.planner import traffic
from distlora.planner.machine import Machine
from distlora.planner.memory.base import Base, planned_base
from distlora.planner.memory.device import DeviceBytes, decomposition_bytes
from distlora.planner.memory.trained import Trained
from distlora.planner.model import PlannedModel
from distlora.planner.storage.disk import optimizer_tensors, trained_tensors
from distlora.planner.workload import Workload
from distlora.system import host_memory

PROCESS_BYTES = 390_000_000
"""A worker's Python, torch, transformers and gloo: RssAnon in a run of 0.4 million parameters (365 to 390 MB on 1 and 2
ranks, torch 2.13 for the CPU, 2026-11-25). What CUDA's libraries take beside it was not measured. Without GPUs ranks
are forks of torchrun and share two thirds of it: with torchrun and the launcher, two take 745 MB, where 960 are planned
(2026-11-26)."""
LAUNCHER_BYTES = 180_000_000
"""The launcher and torchrun on each machine (179 MB in the same runs)."""
LOADING_BYTES = 64_000_000
"""The bound of what loading takes beside the slice of a tensor: chunks that are read ahead, fp32 work, absmax
(tests/test_loading_memory.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostBytes:
    """Bytes of one process, the one that has most, and of its machine."""

    process: int
    """Python and its libraries."""
    base: int
    """The base's rows, where they lie here and not on a GPU."""
    inputs: int
    """The blocks' inputs, with train.checkpointing=offload."""
    moments: int
    """The optimizer's, where they are paged, at the most."""
    copies: int
    """Of what a save writes while training goes on; of rank 0, and of every rank where what is trained is sharded."""
    copies_of_others: int
    """The same on the other ranks."""
    loading: int
    """While it loads: beside what is held then."""
    device_held: int
    """Where the CPU is the device: what memory.py counts there, from the first step on."""
    device_most: int
    """The same at a step's peak."""
    launcher: int
    """Of each machine, beside its processes."""
    ranks: int
    """Of a machine."""

    @property
    def while_loading(self) -> int:
        """Bytes of a process while it loads; activations and copies come later."""
        return self.process + self.base + self.device_held + self.loading

    @property
    def while_training(self) -> int:
        """Bytes of the process that saves."""
        return self._without_copies + self.copies

    @property
    def _without_copies(self) -> int:
        return self.process + self.base + self.inputs + self.moments + self.device_most

    @property
    def workers(self) -> int:
        """All processes of a machine but the launcher, of the one where rank 0 is, at the most."""
        training = self.ranks * (self._without_copies + self.copies_of_others) + self.copies - self.copies_of_others
        return max(self.ranks * self.while_loading, training)

    @property
    def machine(self) -> int:
        """Bytes of a node with the launcher, which already has its memory when it plans."""
        return self.launcher + self.workers

    def as_json(self) -> dict[str, int]:
        """Return every figure in bytes, for programs."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        totals = {name: getattr(self, name) for name in ("while_loading", "while_training", "machine")}
        return values | totals


def keeps_on_host(parallel: ParallelConfig, checkpointing: str, shards: int) -> bool:
    """Return True if the base or activations are offloaded to host memory, with the base sharded over `shards`."""
    return offloads_base(parallel, shards) or checkpointing == "offload"


def host_bytes(work: Workload, model: PlannedModel, machine: Machine, device: DeviceBytes) -> HostBytes:
    """Return the host memory of a training run in which a rank takes `device` on its device."""
    shards = work.shard_degree(machine.ranks)
    copies, of_others = _copies(Saved.of(work, model, shards))
    base = planned_base(work, model)
    trained = Trained.of(work, model.shapes, base, shards)
    return HostBytes(
        process=PROCESS_BYTES,
        base=_base(base, shards) if machine.is_gpu and offloads_base(work.parallel, shards) else 0,
        inputs=_inputs(work, model, machine) if work.checkpointing == "offload" else 0,
        moments=_paged(work, trained, machine),
        copies=copies,
        copies_of_others=of_others,
        loading=_loading(work, model, shards, on_host=not machine.is_gpu),
        device_held=0 if machine.is_gpu else device.persistent,
        device_most=0 if machine.is_gpu else device.total,
        launcher=LAUNCHER_BYTES,
        ranks=machine.ranks_per_machine,
    )


def _base(base: Base, shards: int) -> int:
    """Return the bytes of a rank's rows of the base in chunks, as `zero3.host_bytes` counts them."""
    rows = [tensor.kept(shards) for tensor, count in base.counted() for _ in range(count)]
    return host_memory.bytes_of(sorted(rows, reverse=True))


def _paged(work: Workload, trained: Trained, machine: Machine) -> int:
    """Return the bytes of paged optimizer states that move to the host if the GPU is short of memory."""
    whole, on_gpu = (trained.optimizer_bytes(work.optimizer, is_gpu=is_gpu) for is_gpu in (False, True))
    return whole - on_gpu if machine.is_gpu else 0


def _inputs(work: Workload, model: PlannedModel, machine: Machine) -> int:
    """Return the bytes that `distlora.training.setup` reserves for offloaded activations."""
    shapes = model.shapes
    nbytes = work.tokens_at_once * shapes.hidden * traffic.DTYPE_BYTES[work.dtype]
    return host_memory.bytes_of([nbytes] * shapes.num_layers * work.slices(machine.ranks))


@dataclass(frozen=True, slots=True)
class Saved:
    """All that what a save copies depends on, as a key of what is remembered; `config` has it too."""

    adapters: Asked
    beside: tuple[AdapterConfig, ...] = field(hash=False)
    """Of a pack's other trials."""
    work: Workload = field(compare=False)

    @classmethod
    def of(cls, work: Workload, model: PlannedModel, shards: int) -> Saved:
        """Build the key of a workload's background save."""
        return cls(
            Asked(
                model.shapes,
                work.adapter,
                (work.optimizer, work.new_tokens, work.save_in_background, shards),
            ),
            work.adapters,
            work,
        )


@functools.lru_cache(maxsize=16)
def _copies(saved: Saved) -> tuple[int, int]:
    """Return the bytes of a background save's copies (on rank 0, on another rank), as `Snapshot` takes them.

    Rank 0 copies everything that is saved; each rank copies its rows of sharded tensors. Cached, since a planner tries
    many settings for which the result is the same.
    """
    work, shards = saved.work, saved.adapters.more[-1]
    if not work.save_in_background:
        return 0, 0
    trained = list(trained_tensors(work, saved.adapters.shapes))
    tensors = [*trained, *optimizer_tensors(work, trained)]
    if work.adapter.method == "full":
        each = host_memory.bytes_of([-(-tensor.nbytes // shards) for tensor in tensors])
        return each, each
    whole = tuple(work.adapter.modules_to_save)
    cut = [tensor for tensor in tensors if tensor.name.endswith(tuple(f"{name}.weight" for name in whole))]
    rows = [-(-tensor.nbytes // shards) for tensor in cut]
    rest = [tensor.nbytes for tensor in tensors if tensor not in cut]
    return host_memory.bytes_of(rest + rows), host_memory.bytes_of(rows)


def _loading(work: Workload, model: PlannedModel, shards: int, *, on_host: bool) -> int:
    """Return the bound of loading: a slice of the largest tensor in the source's dtype, and 64 MB.

    Adapters made from the base's weights need one whole weight and its decomposition, on a GPU in its memory.
    """
    shapes, stored = model.shapes, model.stored_bytes
    itemsize = 4 if stored is not None and stored > 3 * shapes.numel else 2
    packed = [weight for weight in shapes.block if weight.packs]
    largest = max(shapes.vocabulary * shapes.hidden, *(math.prod(weight.shape[-2:]) for weight in packed))
    slice_bytes = -(-itemsize * largest // shards) + LOADING_BYTES
    if work.adapter.init in PLAIN:
        return slice_bytes
    whole = max((weight.shape[-2:] for weight in packed), key=math.prod)
    return max(slice_bytes, itemsize * math.prod(whole) + (decomposition_bytes(work, whole) if on_host else 0))
