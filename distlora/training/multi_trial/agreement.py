"""What the ranks of a pack find out between steps, told to all: a path that rank 0 read, and whether some rank failed.

In the group of the ranks' words: from NCCL a number is read by waiting for the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from distlora.config import UserError
from distlora.parallel import Ranks

Made = TypeVar("Made")

_LONGEST_PATH = 4096


def path_of_rank_0(path: Path, ranks: Ranks) -> Path:
    """Rank 0's path on every rank."""
    if ranks.control is None:
        return path
    said = os.fsencode(path)
    assert len(said) <= _LONGEST_PATH, path
    word = torch.tensor(list(said.ljust(_LONGEST_PATH, b"\0")), dtype=torch.uint8)
    dist.broadcast(word, group=ranks.control, group_src=0)
    return Path(os.fsdecode(bytes(word.tolist()).rstrip(b"\0")))


def together(action: Callable[[], Made], ranks: Ranks) -> Made:
    """The result of `action`, which calls on no other rank after it may have failed. Raises UserError, on every rank,
    where it did on some."""
    made: list[Made] = []
    error: UserError | None = None
    try:
        made.append(action())
    except UserError as own:
        error = own
    if ranks.control is not None:
        word = torch.tensor(-1 if error is None else ranks.rank, dtype=torch.int64)
        dist.all_reduce(word, dist.ReduceOp.MAX, group=ranks.control)
        if error is None and word >= 0:
            error = UserError(f"rank {int(word)} cannot go on with it; logs/rank_{int(word)}.log of the pack says why")
    if error is not None:
        raise error
    return made[0]
