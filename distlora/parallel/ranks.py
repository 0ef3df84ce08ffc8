"""Who the workers of a run are to each other: how they meet, and how they leave."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from distlora.parallel import watch

AFTER_WATCH = timedelta(minutes=10)
"""How much longer than the longest wait that `watch` allows torch lets a rank wait for another: the watch, which knows
who is where, speaks first. A worker that dies ends the run at once all the same: torchrun sees it."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Who this process is among the run's workers, and where it computes."""

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None
    """All workers; None for a single process, which starts no process group."""
    watching: watch.Watch | None = None
    """What ends this process when the ranks hang."""
    control: dist.ProcessGroup | None = None
    """All workers again, over gloo, for what they agree on beside training (`parallel/control.py`)."""
    timeout: timedelta | None = None
    """How long torch lets a rank wait for another in a group; None: as long as it does by itself."""

    @property
    def leads_machine(self) -> bool:
        """Whether this is the rank that does what a machine needs once."""
        return os.environ.get("LOCAL_RANK", "0") == "0"


def join_ranks(timeout_seconds: float | None = None) -> Ranks:
    """Join the workers that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK): NCCL with GPUs, gloo without.

    `timeout_seconds`: how long this rank may wait for the others within a step, marked by `watch.at`, before the
    process ends and names the one that hangs; None: such waits end by torch's own timeout.
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


def open_store(rank: int, timeout: timedelta) -> dist.TCPStore:
    """The store through which the workers of torchrun find each other. It is kept by rank 0, or by torchrun; unlike
    torch's own `rendezvous`, this does not wait until all are there.
    """
    agent_keeps_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not agent_keeps_it,
        timeout=timeout,
        wait_for_workers=False,
    )


def leave_ranks(ranks: Ranks) -> None:
    """Leave the group. Without the barrier, a rank that leaves early can abort one that is still tidying up."""
    if ranks.group is not None:
        dist.barrier(ranks.group)
        if ranks.watching is not None:
            ranks.watching.stop()
        dist.destroy_process_group()


def from_rank_0(number: int, ranks: Ranks) -> int:
    """Rank 0's number on every rank, whatever the others were given. For what one rank finds out, not for a step.

    In the group of the ranks' words: from NCCL a number is read by waiting for the device.
    """
    assert (ranks.control is None) == (ranks.world == 1), "the words of several ranks need a group of their own"
    if ranks.control is None:
        return number
    shared = torch.tensor(number, dtype=torch.int64)
    dist.broadcast(shared, group=ranks.control, group_src=0)
    return int(shared)


def sum_over_ranks(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The elementwise sum over all ranks of a tensor in host memory, in place. As `from_rank_0`, not for a step."""
    if ranks.control is not None:
        dist.all_reduce(tensor, group=ranks.control)
    return tensor
