"""Copies of a run's state in host memory, which stay as they are while training goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distlora.checkpoints.files import Files
from distlora.parallel import Backend
from distlora.parallel.streams import HostRows

CHUNK_BYTES = 64 * 2**20
"""Of host memory that is taken at once: a power of two, to which torch rounds pinned memory up."""


class Snapshot:
    """Memory for one copy of what this rank has to save, taken at the first save and used again by every later one:
    fresh pages cost five times what copying into old ones does, and pinned memory far more to get.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._memory: dict[tuple[str, str], Tensor] = {}
        self._chunk: Tensor | None = None
        self._used = 0
        self._copied: torch.cuda.Event | None = None

    @property
    def num_bytes(self) -> int:
        """Of host memory that is held."""
        return sum(tensor.nbytes for tensor in self._memory.values())

    def has_room(self, files: Files) -> bool:
        """Whether the machine has memory for the copies of its ranks, as far as it can be told; the same on every rank,
        and every rank must ask."""
        needed = 0
        if not self._memory:
            own = sum(self._own(tensor)[0].nbytes for _, tensor in tensors_of(files) if self._is_copied(tensor))
            needed = own * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        available = available_bytes()
        lacks = torch.tensor(available is not None and needed > available, device=self._backend.ranks.device).int()
        return not self._backend.max_over_ranks(lacks)

    def take(self, files: Files) -> Files:
        """`files` with copies in the tensors' place: whole on the rank that writes, and everywhere this rank's rows of
        what was cut. On other ranks whole tensors stay as they are, since nothing is read of them.

        From a GPU they are only queued behind its work so far, and before what comes after: the caller may go on at
        once, and a reader calls `wait` first. The copies of the call before are overwritten.
        """
        own: list[Tensor] = []
        found: list[Tensor] = []
        copies: dict[str, dict[str, Tensor | HostRows]] = {}
        for (name, key), tensor in tensors_of(files):
            held: Tensor | HostRows = tensor
            if self._is_copied(tensor):
                rows, first_row = self._own(tensor)
                held = self._memory_for((name, key), rows)
                own.append(held)
                found.append(rows)
                if isinstance(tensor.data, DTensor):
                    held = HostRows(local=held, first_row=first_row, shape=tensor.shape)
            copies.setdefault(name, {})[key] = held
        with torch.no_grad():
            torch._foreach_copy_(own, found, non_blocking=True)
        devices = {tensor.device for tensor in found if tensor.is_cuda}
        assert len(devices) <= 1
        if devices:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(devices.pop()))
        return {**files, **copies}

    def wait(self) -> None:
        """Until the copies hold what they are to hold. From any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _is_copied(self, tensor: Tensor) -> bool:
        return self._backend.writes or isinstance(tensor.data, DTensor)

    def _own(self, tensor: Tensor) -> tuple[Tensor, int]:
        """What this rank has of a tensor, and the index of its first row."""
        return self._backend.local_rows(tensor.detach())

    def _memory_for(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        held = self._memory.get(key)
        if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
            held = self._bytes(tensor.nbytes, pinned=tensor.is_cuda).view(tensor.dtype).view(tensor.shape)
            self._memory[key] = held
        return held

    def _bytes(self, size: int, *, pinned: bool) -> Tensor:
        """(size,) uint8 of a chunk, from a multiple of 64 on."""
        if self._chunk is None or self._used + size > self._chunk.numel() or self._chunk.is_pinned() != pinned:
            self._chunk = torch.empty(max(CHUNK_BYTES, size), dtype=torch.uint8, pin_memory=pinned)
            self._used = 0
        taken = self._chunk[self._used : self._used + size]
        self._used += -(-size // 64) * 64
        return taken


def tensors_of(files: Files) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """((file, name), tensor) of what a checkpoint is made of, as it is in training."""
    for name, content in files.items():
        if name.endswith(".safetensors"):
            for key, tensor in content.items():
                assert isinstance(tensor, Tensor), f"{key} in {name} is not in training"
                yield (name, key), tensor


def is_cut(files: Files) -> bool:
    """Whether a rank has only some rows of what is saved."""
    return any(isinstance(tensor.data, DTensor) for _, tensor in tensors_of(files))


def available_bytes() -> int | None:
    """Host memory that can be had without swapping, by the kernel; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # Not Linux.
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
