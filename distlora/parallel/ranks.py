"""Join the worker processes of a run into process groups, and leave them."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from distlora.parallel import watch
from distlora.system.listening import listen

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
    """Gloo group of all workers for agreements beside training (`parallel/stop_and_save.py`)."""
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
