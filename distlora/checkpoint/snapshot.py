"""Copies of a run's state in host memory, which stay as they are while training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distlora.checkpoint.files import Files
from distlora.parallel import Backend
from distlora.parallel.shards import HostRows
from distlora.system import host_memory


class Snapshot:
    """Memory for one copy of what this rank has to save, taken at the first save and used again by every later one:
    fresh pages cost five times what copying into old ones does, and pinned memory far more to get.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._memory: dict[tuple[str, str], Tensor] = {}
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
            own = [self._own(tensor)[0] for _, tensor in tensors_of(files) if self._is_copied(tensor)]
            needed = host_memory.bytes_like(own)
        return not self._backend.lacks_host_memory(needed)

    def take(self, files: Files) -> Files:
        """`files` with copies in the tensors' place: whole on the rank that writes, and where this rank's rows of what
        was cut are saved those. All other tensors stay as they are, since nothing is read of them.

        From a GPU they are only queued behind its work so far, and before what comes after: the caller may go on at
        once, and a reader calls `wait` first. The copies of the call before are overwritten.
        """
        found = {key: self._own(tensor) for key, tensor in tensors_of(files) if self._is_copied(tensor)}
        rows = {key: own for key, (own, _) in found.items()}
        self._take_memory(rows)
        copies: dict[str, dict[str, Tensor | HostRows]] = {}
        for (name, key), tensor in tensors_of(files):
            held: Tensor | HostRows = tensor
            if (name, key) in found:
                held = self._memory[name, key]
                if isinstance(tensor.data, DTensor):
                    held = HostRows(local=held, first_row=found[name, key][1], shape=tensor.shape)
            copies.setdefault(name, {})[key] = held
        if rows:
            with torch.no_grad():
                torch._foreach_copy_([self._memory[key] for key in rows], list(rows.values()), non_blocking=True)
        devices = {tensor.device for tensor in rows.values() if tensor.is_cuda}
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
        return self._backend.writes or (self._backend.gives_rows and isinstance(tensor.data, DTensor))

    def _own(self, tensor: Tensor) -> tuple[Tensor, int]:
        """What this rank has of a tensor, and the index of its first row."""
        return self._backend.local_rows(tensor.detach())

    def _take_memory(self, rows: Mapping[tuple[str, str], Tensor]) -> None:
        """Memory for what has none yet, or had another shape or type."""
        kinds = {key: (held.shape, held.dtype) for key, held in self._memory.items()}
        missing = {key: own for key, own in rows.items() if kinds.get(key) != (own.shape, own.dtype)}
        self._memory |= zip(missing, host_memory.memory_like(list(missing.values())), strict=True)


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
