"""Copies of a run's state in host memory, which stay as they are while training goes on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distlora.checkpoints.files import Files
from distlora.tensor_files import Unmade

CHUNK_BYTES = 64 * 2**20
"""Of host memory that is taken at once: a power of two, to which torch rounds pinned memory up."""


class Snapshot:
    """Memory for one copy of a checkpoint's tensors, taken at the first save and used again by every later one: fresh
    pages cost five times what copying into old ones does, and pinned memory far more to get.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}
        self._chunk: Tensor | None = None
        self._used = 0
        self._copied: torch.cuda.Event | None = None

    @property
    def num_bytes(self) -> int:
        """Of host memory that is held."""
        return sum(tensor.nbytes for tensor in self._memory.values())

    def take(self, files: Files) -> Files:
        """`files` with copies in the tensors' place, of plain tensors of any device.

        From a GPU they are only queued behind its work so far, and before what comes after: the caller may go on at
        once, and a reader calls `wait` first. The copies of the call before are overwritten.
        """
        own: list[Tensor] = []
        found: list[Tensor] = []
        copies: dict[str, dict[str, Tensor]] = {}
        for name, content in files.items():
            if not name.endswith(".safetensors"):
                continue
            copies[name] = {}
            for key, tensor in content.items():
                assert not isinstance(tensor, (Unmade, DTensor)), f"{key} in {name} is not in this rank's memory"
                copies[name][key] = self._memory_for((name, key), tensor)
                own.append(copies[name][key])
                found.append(tensor.detach())
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
