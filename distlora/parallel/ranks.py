"""Join the worker processes of a run into process groups, and leave them; which ranks shard a replica of the base.

A replica is sharded along dim 0, ceil(rows / ranks) rows each.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from distlora.config import require
from distlora.parallel import watch
from distlora.system.listening import listen

LEAST_CAPABILITY = (8, 0)
"""Least compute capability of a GPU: earlier ones (T4, V100) have no bf16, and Triton compiles none of it for them."""
AFTER_WATCH = timedelta(days=2)
"""Seconds by which torch's timeout exceeds the longest wait that `watch` allows.

The watch knows which rank hangs, so it must report first, and none hangs that computes rewards for hours. A dead worker
ends the run at once in any case: the launcher sees it."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Rank, world size, device and process groups of this process."""

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None
    """Group of all workers; None for a single process, which starts no process group."""
    watching: watch.Watch | None = None
    """Hang watch, which ends this process when the ranks hang."""
    control: dist.ProcessGroup | None = None
    """Gloo group of all workers for agreements beside training (`watch.Control`)."""
    timeout: timedelta | None = None
    """Seconds after which torch ends a collective; None: torch's default."""

    def __post_init__(self) -> None:
        # torch.cuda.set_device, for one, refuses a device without an index.
        if self.device.type == "cuda" and self.device.index is None:
            object.__setattr__(self, "device", torch.device("cuda", torch.cuda.current_device()))

    def part_of(self, count: int) -> range:
        """Return this rank's part of `count` things, which the ranks divide into neighbouring ones."""
        first, last = (number * count // self.world for number in (self.rank, self.rank + 1))
        return range(first, last)

    @property
    def leads_machine(self) -> bool:
        """True on the rank that does what a node needs once."""
        return os.environ.get("LOCAL_RANK", "0") == "0"


def join_ranks(timeout_seconds: float | None = None) -> Ranks:
    """Join the workers that the launcher started (RANK, WORLD_SIZE, LOCAL_RANK): NCCL with GPUs, gloo without.

    `timeout_seconds`: how long this rank may wait for the others within a step, as marked by `watch.at`, before the
    process ends and names the rank that hangs; None: torch's timeout applies.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        require(
            capability >= LEAST_CAPABILITY,
            f"{name} has compute capability {capability[0]}.{capability[1]}, and GPU kernels need bf16 (8.0, Ampere "
            "or later); use another GPU, or hide it with CUDA_VISIBLE_DEVICES= to train on the CPU",
        )
    else:
        device = torch.device("cpu")
    if world == 1:
        return Ranks(rank, world, device, None)
    longest = timedelta(seconds=max(timeout_seconds or 0.0, watch.LONG_SECONDS)) + AFTER_WATCH
    store = open_store(rank, longest)
    watching = None
    if timeout_seconds is not None:
        watch.at(None, "joining the other ranks", long=True)
        watching = watch.Watch(store, rank, world, timeout_seconds=timeout_seconds, end=watch.end_process)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=longest)
    control = dist.new_group(backend="gloo", timeout=longest)
    return Ranks(rank, world, device, dist.group.WORLD, watching=watching, control=control, timeout=longest)


def open_store(rank: int, timeout: timedelta = AFTER_WATCH) -> dist.TCPStore:
    """Return the store through which the ranks find each other (MASTER_ADDR, MASTER_PORT); rank 0 holds it.

    On one node the store, gloo and NCCL listen on loopback only, unless the user has set GLOO_SOCKET_IFNAME or
    NCCL_SOCKET_IFNAME. Unlike torch's `rendezvous`, this does not wait until all ranks are connected.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if host == "127.0.0.1":  # The launcher's address for ranks on one node.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo0" if sys.platform == "darwin" else "lo")
    listening = listen(host, port).detach() if rank == 0 else None  # By itself TCPStore listens on all interfaces.
    return dist.TCPStore(
        host, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False, master_listen_fd=listening
    )


def leave_ranks(ranks: Ranks) -> None:
    """Leave the process group. Without the barrier, a rank that leaves early can abort one that still cleans up."""
    if ranks.group is not None:
        dist.barrier(ranks.group)
        if ranks.watching is not None:
            ranks.watching.stop()
        dist.destroy_process_group()


def from_rank_0(number: int, ranks: Ranks) -> int:
    """Return rank 0's number on every rank. For decisions of one rank, not for a step.

    It uses the gloo group: reading a number from NCCL waits for the device.
    """
    assert (ranks.control is None) == (ranks.world == 1), "several ranks need a control group"
    if ranks.control is None:
        return number
    shared = torch.tensor(number, dtype=torch.int64)
    dist.broadcast(shared, group=ranks.control, group_src=0)
    return int(shared)


def max_over_ranks(number: int, ranks: Ranks) -> int:
    """Return the largest of all ranks' numbers. Like `from_rank_0`, not for a step."""
    shared = torch.tensor(number, dtype=torch.int64)
    if ranks.control is not None:
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=ranks.control)
    return int(shared)


def sum_over_ranks(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Sum a tensor in host memory elementwise over all ranks, in place. Like `from_rank_0`, not for a step."""
    if ranks.control is not None:
        dist.all_reduce(tensor, group=ranks.control)
    return tensor


@dataclass(slots=True)
class Traffic:
    """Bytes of this rank's collectives since the last `take`: gathered results, reduced buffers, scattered gradients.

    Scattered bytes count the whole gradients of which each rank keeps the sum of its rows. Exchanged bytes count the
    rows of this rank's tokens that go to the ranks of their experts (parallel.expert_degree), or come back.
    """

    gathered_bytes: int = 0
    reduced_bytes: int = 0
    scattered_bytes: int = 0
    between_replicas_bytes: int = 0
    """Bytes of all these in groups with ranks of several replicas of the base (`Shards.crosses`)."""
    exchanged_bytes: int = 0

    def take(self) -> Traffic:
        """Return the counts and reset them to zero."""
        counts = replace(self)
        self.restore(Traffic())
        return counts

    def per_step(self, num_steps: int) -> Traffic:
        """Return the counts of one of `num_steps` steps."""
        return Traffic(**{name: count // num_steps for name, count in asdict(self).items()})

    def add(self, counts: Traffic) -> None:
        """Add other counts."""
        for name, count in asdict(counts).items():
            setattr(self, name, getattr(self, name) + count)

    def restore(self, counts: Traffic) -> None:
        """Reset to earlier counts."""
        for name, count in asdict(counts).items():
            setattr(self, name, count)


# TODO: call dist.all_gather_single once torch >= 2.13, which gave it this name, is required.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True, slots=True)
class Shards:
    """Ranks that shard one replica of the base, and this rank's place among them.

    They are consecutive, like the ranks of a node: traffic of the base stays within a node if their number divides the
    node's number of ranks.
    """

    index: int
    count: int
    """Number of ranks per replica; 1: nothing is sharded."""
    group: dist.ProcessGroup | None
    """Process group of the replica; None if nothing is sharded."""
    replica: int = 0
    """Index of this rank's replica of the base."""
    num_replicas: int = 1
    """Number of replicas."""
    replicate_group: dist.ProcessGroup | None = None
    """Group of the ranks that hold the same rows, one of each replica; None with one replica."""

    @classmethod
    def over(cls, ranks: Ranks, degree: int | None = None) -> Shards:
        """Divide the ranks into replicas of `degree` ranks each, which must divide their number; None: one over all.

        Every rank must call it alike, because it makes process groups.
        """
        degree = ranks.world if degree is None else degree
        if degree == ranks.world:
            return cls(ranks.rank, ranks.world, ranks.group)
        assert ranks.world % degree == 0, f"{ranks.world} ranks do not divide into groups of {degree}"
        replica, index = divmod(ranks.rank, degree)
        group, replicate_group, num_replicas = None, ranks.group, ranks.world // degree
        if degree > 1:
            parts = torch.arange(ranks.world).view(num_replicas, degree)
            group, replicate_group = (
                dist.new_subgroups_by_enumeration(members.tolist(), timeout=ranks.timeout)[0]
                for members in (parts, parts.T)
            )
        return cls(index, degree, group, replica, num_replicas, replicate_group)

    def mesh(self, device_type: str) -> DeviceMesh:
        """Return FSDP2's device mesh: the ranks of a replica, after a dimension of replicas if there are several."""
        assert self.group is not None
        if self.replicate_group is None:
            return DeviceMesh.from_group(self.group, device_type, mesh_dim_names=("shard",))
        ranks = torch.arange(self.num_replicas * self.count).view(self.num_replicas, self.count)
        groups = [self.replicate_group, self.group]
        return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=("replicate", "shard"))

    def rank_of(self, index: int, replica: int | None = None) -> int:
        """Return the rank that holds the `index`-th shard of a replica; of this rank's without `replica`."""
        return (self.replica if replica is None else replica) * self.count + index

    def split_replicas(self, per_machine: int) -> list[int]:
        """Return the replicas that span two nodes of so many ranks each."""
        if per_machine % self.count == 0 or self.count % per_machine == 0:
            return []
        ends = ((n, self.rank_of(0, n), self.rank_of(self.count - 1, n)) for n in range(self.num_replicas))
        return [replica for replica, first, last in ends if first // per_machine != last // per_machine]

    def crosses(self, group: dist.ProcessGroup) -> bool:
        """Return whether ranks of more than one replica belong to `group`."""
        return len({rank // self.count for rank in dist.get_process_group_ranks(group)}) > 1


@dataclass(frozen=True, slots=True)
class Cut:
    """Shard of a parameter that is empty until it is gathered (ZeRO-3), read by `local_rows`."""

    padded: Tensor
    """(rows of a rank, ...): this rank's, in the memory that is gathered from, with zeros at the end on the last
    rank."""
    first_row: int
    shape: torch.Size
    """Shape of the whole parameter."""

    @classmethod
    def of(cls, padded: Tensor, shape: torch.Size, shards: Shards) -> Cut:
        """Build from the memory of this rank's rows of a parameter of this shape."""
        return cls(padded, min(shards.index * len(padded), shape[0]), shape)

    @property
    def rows(self) -> Tensor:
        """Return this rank's rows without those that fill up."""
        return self.padded[: min(len(self.padded), self.shape[0] - self.first_row)]


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Return this rank's rows of dim 0, as writable memory, and the index of the first of them."""
    data, cut = tensor.data, getattr(tensor, "cut", None)
    if cut is not None:  # ZeRO-3: the tensor is empty until it is gathered.
        return cut.rows, cut.first_row
    if not isinstance(data, DTensor):
        return data, 0
    # FSDP2 shards dim 0 like torch.chunk: ceil(rows / ranks) each, and the last ranks may get fewer or none. With
    # several replicas its mesh has a second dimension.
    mesh, axis = data.device_mesh, data.placements.index(Shard(0))
    per_rank = -(-data.shape[0] // mesh.size(axis))
    return data.to_local(), min(per_rank * mesh.get_local_rank(axis), data.shape[0])


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the unsharded tensor."""
    cut = getattr(tensor, "cut", None)
    return tensor.data.shape if cut is None else cut.shape


PIECE_BYTES = 8 * 2**20
"""Bytes sent at once: 8 ms at 1 GB/s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostRows:
    """Host copy of this rank's rows of a tensor that is sharded along dim 0, ceil(rows / ranks) rows each."""

    local: Tensor
    """(rows of this rank, ...), contiguous."""
    first_row: int
    shape: torch.Size
    """Shape of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the shard."""
        return self.local.dtype

    def numel(self) -> int:
        """Return the number of elements of the whole tensor."""
        return self.shape.numel()


def stream_rows(
    rows: HostRows, write: Callable[[Tensor], object], *, group: dist.ProcessGroup, rank: int, world: int
) -> None:
    """Pass the whole tensor to `write` on rank 0, in flat pieces and in order. Other ranks do not call it.

    The first `world` ranks of `group` hold it, and each must call this for the same tensors in the same order, on one
    thread.
    """
    flat, start = rows.local.view(-1), rows.first_row * math.prod(rows.shape[1:])
    size = PIECE_BYTES // rows.dtype.itemsize
    received = torch.empty(min(size, rows.numel()) if rank == 0 else 0, dtype=rows.dtype)
    for owner, low, high in pieces(rows.shape, world, size):
        if rank not in (0, owner):
            continue
        piece = flat[low - start : high - start] if owner == rank else received[: high - low]
        if owner != 0 and rank == 0:
            dist.recv(piece, group=group, group_src=owner)
        elif owner != 0:
            dist.send(piece, group=group, group_dst=0)
        if rank == 0:
            write(piece)


def pieces(shape: torch.Size, count: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (shard, first element, end) of the flat pieces (at most `size` elements) of a tensor in `count` shards."""
    per_shard = -(-shape[0] // count) * math.prod(shape[1:])
    for first in range(0, shape.numel(), per_shard):
        end = min(first + per_shard, shape.numel())
        yield from ((first // per_shard, low, min(low + size, end)) for low in range(first, end, size))
