"""Calculate the GPU memory that libraries and torch's allocator take beside tensors. Imports no torch.

None of it is counted by torch.cuda.max_memory_allocated, but cuBLAS' workspaces. CUDA's context is not here: a GPU's
usable bytes are without it (distlora/config/gpus.py). No GPU has run it: figures are the libraries' own constants.
"""

from __future__ import annotations

from distlora.config.deepspeed_file import offloads_base
from distlora.planner.machine import Machine
from distlora.planner.memory import Kind
from distlora.planner.memory.base import Base, unit_bytes
from distlora.planner.memory.trained import Trained
from distlora.planner.workload import Workload

_MIB = 2**20
_ROUNDED = 512
"""Bytes that every tensor's memory is a multiple of (CUDACachingAllocator.cpp: kMinBlockSize)."""
_SMALL, _LARGE = 2 * _MIB, 20 * _MIB
"""Segments that tensors of up to 1 MiB, and of up to 10 MiB, share (kSmallBuffer, kLargeBuffer); larger ones have
segments of their own, of multiples of 2 MiB (kRoundLarge), whose rest is used if it is above 1 MiB (should_split)."""
_CALLING_THREADS = 2
"""Forward's and autograd's: each has a workspace of cuBLAS."""
_WORKSPACE, _WORKSPACE_OF_HOPPER = 2 * 4096 * 1024 + 8 * 16 * 1024, 32 * _MIB
"""One of them, by the GPU's capability (CUDAContext's CublasHandlePool.cpp: parseChosenWorkspaceSize)."""
_RECEIVING, _SENDING = 10 * _MIB, 2 * _MIB
"""NCCL's buffers of one connection of a channel: its three protocols' (init.cc: DEFAULT_BUFFSIZE of 4 MiB,
DEFAULT_LL128_BUFFSIZE of 4.7, DEFAULT_LL_BUFFSIZE of 0.5) in pages of 2 MiB at the receiving end, a page at the sending
one; such allocations were counted in github.com/NVIDIA/nccl/issues/1685."""
_CHANNELS = {True: 32, False: 4}
"""Over NVLink, as that issue's log has them on 8 H100; over PCIe, where a few are as fast as the bus."""


def beside_tensors(work: Workload, base: Base, trained: Trained, machine: Machine, *, largest: int) -> dict[Kind, int]:
    """Return the most bytes by category; empty on a CPU. `largest`: bytes of the largest tensor of a step."""
    if not machine.is_gpu:
        return {}
    shards = work.shard_degree(machine.ranks)
    return {
        "communication": _nccl(work, machine, shards),
        "working": _workspaces(machine),
        "slack": _rounding(work, base, trained, shards)
        + _segments(work, base, shards, largest=largest)
        + _late(work, base, shards),
    }


def _workspaces(machine: Machine) -> int:
    """cuBLAS'; the larger ones of a GPU that is not known."""
    is_small = machine.gpu is not None and machine.gpu.capability[0] not in (9, 10)
    return _CALLING_THREADS * (_WORKSPACE if is_small else _WORKSPACE_OF_HOPPER)


def _nccl(work: Workload, machine: Machine, shards: int) -> int:
    """Return the bytes of NCCL's buffers.

    The group that sums gradients has rings and trees: one ring connection and two tree connections, both ways. With
    several copies of the base there is a group that gathers, by rings, and one between copies if the base is trained.
    github.com/NVIDIA/nccl/issues/864 shows 1.6 GB after a first all-reduce, CUDA's context included; 32 channels are
    1.2 GB of it.
    """
    if machine.ranks == 1:
        return 0
    connections = 3
    if 1 < shards < machine.ranks:
        connections += 1 if work.adapter.trains_base is None else 2
    channels = _CHANNELS[machine.has_nvlink is not False]
    return channels * connections * (_RECEIVING + _SENDING)


def _rounding(work: Workload, base: Base, trained: Trained, shards: int) -> int:
    """Return the bytes lost at the ends of tensors that stay."""
    offloads = offloads_base(work.parallel, shards)
    lost = 0 if offloads else sum(count * _lost(tensor.kept(shards)) for tensor, count in base.counted())
    return lost + sum(3 * count * _lost(4 * numel) for numel, count in trained.adapters.items())


def _late(work: Workload, base: Base, shards: int) -> int:
    """Return the bytes that DeepSpeed freed while the device is still a unit behind.

    torch counts them as free and gives them to nobody (CUDACachingAllocator.cpp: free, insert_events).
    """
    return unit_bytes(base.block, shards) if shards > 1 and work.parallel.backend == "zero3" else 0


def _lost(nbytes: int) -> int:
    rest = -nbytes % _SMALL
    return rest if nbytes >= _LARGE // 2 and rest <= _MIB else -nbytes % _ROUNDED


def _segments(work: Workload, base: Base, shards: int, *, largest: int) -> int:
    """Return the bytes that are reserved and unused at the peak.

    Freed memory serves only the stream that took it, so each stream has a partly filled segment of each kind. A hole as
    large as the largest tensor may lie between smaller ones. On the stream of gathers, a block's output may lie in the
    memory of the embedding's when the head is gathered.
    """
    streams, hole = 1, 0
    if shards > 1:
        streams += 1 if work.adapter.trains_base is None else 2
        hole = unit_bytes(base.head, shards)
    return streams * (_SMALL + _LARGE) + largest + hole
