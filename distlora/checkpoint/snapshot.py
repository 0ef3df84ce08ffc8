"""Copies of a run's state in host memory, which do not change while training continues."""

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
    """Host memory for one copy of this rank's state, allocated at the first save and reused by later ones.

    Fresh pages cost five times as much as copying into old ones, and pinned memory far more.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._memory: dict[tuple[str, str], Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory held."""
        return sum(tensor.nbytes for tensor in self._memory.values())

    def has_room(self, files: Files) -> bool:
        """Return whether the node has memory for the copies of its ranks; the same on every rank.

        Every rank must call it.
        """
        needed = 0
        if not self._memory:
            mine = [self._local(tensor)[0] for _, tensor in tensors_of(files) if self._is_copied(tensor)]
            needed = host_memory.bytes_like(mine)
        return not self._backend.lacks_host_memory(needed)

    def take(self, files: Files) -> Files:
        """Return `files` with copies of the tensors that this rank saves: whole ones, or its rows of sharded ones.

        Other tensors stay as they are. From a GPU the copies are queued behind its work so far: the caller may continue
        at once, and a reader calls `wait` first. The previous call's copies are overwritten.
        """
        parts = {key: self._local(tensor) for key, tensor in tensors_of(files) if self._is_copied(tensor)}
        rows = {key: part for key, (part, _) in parts.items()}
        self._take_memory(rows)
        copies: dict[str, dict[str, Tensor | HostRows]] = {}
        for (name, key), tensor in tensors_of(files):
            held: Tensor | HostRows = tensor
            if (name, key) in parts:
                held = self._memory[name, key]
                if isinstance(tensor.data, DTensor):
                    held = HostRows(local=held, first_row=parts[name, key][1], shape=tensor.shape)
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
        """Wait until the copies are complete. From any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _is_copied(self, tensor: Tensor) -> bool:
        return self._backend.writes or (self._backend.gives_rows and isinstance(tensor.data, DTensor))

    def _local(self, tensor: Tensor) -> tuple[Tensor, int]:
        """Return this rank's part of a tensor, and the index of its first row."""
        return self._backend.local_rows(tensor.detach())

    def _take_memory(self, rows: Mapping[tuple[str, str], Tensor]) -> None:
        """Allocate memory for tensors that have none yet, or had another shape or dtype."""
        kinds = {key: (held.shape, held.dtype) for key, held in self._memory.items()}
        missing = {key: row for key, row in rows.items() if kinds.get(key) != (row.shape, row.dtype)}
        self._memory |= zip(missing, host_memory.memory_like(list(missing.values())), strict=True)


def tensors_of(files: Files) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Yield ((file, name), tensor) of a checkpoint's files."""
    for name, content in files.items():
        if name.endswith(".safetensors"):
            for key, tensor in content.items():
                assert isinstance(tensor, Tensor), f"{key} in {name} is not a tensor"
                yield (name, key), tensor


def is_cut(files: Files) -> bool:
    """Return whether some tensors are sharded."""
    return any(isinstance(tensor.data, DTensor) for _, tensor in tensors_of(files))
