"""Host memory: the available amount, and chunks of it for many tensors. Imports torch lazily, for the planner."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 64 * 2**20
"""Minimum bytes of a chunk. Chunks are powers of two, to which torch rounds pinned memory up."""
TENSORS_IN_A_CHUNK = 8
"""Minimum number of the largest tensors in a chunk; the rest of a chunk's end is unused."""
ALIGNMENT = 64

_LIMITS = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
"""Files of a cgroup (version 2, version 1): its limit and its usage."""


def lay_out(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return places for tensors of these bytes: (bytes of each chunk, (chunk, first byte) of each tensor)."""
    chunks: list[int] = []
    places: list[tuple[int, int]] = []
    needs = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    left, used, several = sum(needs), 0, _power_from(TENSORS_IN_A_CHUNK * max(needs, default=0))
    for need in needs:
        if not chunks or used + need > chunks[-1]:
            # Powers of two: at least this tensor, and at most all that are left.
            chunks.append(max(CHUNK_BYTES, _power_from(need), min(several, 1 << max(left.bit_length() - 1, 0))))
            used = 0
        places.append((len(chunks) - 1, used))
        used += need
        left -= need
    return chunks, places


def bytes_of(sizes: Sequence[int]) -> int:
    """Return the bytes that `take_places` allocates."""
    return sum(lay_out(sizes)[0])


def bytes_like(tensors: Sequence[Tensor]) -> int:
    """Return the bytes that `memory_like` allocates."""
    return sum(bytes_of([tensor.nbytes for tensor in kind]) for kind in _kinds(tensors).values())


def memory_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Allocate contiguous host memory of each tensor's shape and dtype, uninitialized; pinned for GPU tensors."""
    by_id: dict[int, Tensor] = {}
    for pinned, kind in _kinds(tensors).items():
        places = take_places([tensor.nbytes for tensor in kind], pinned=pinned)
        for tensor, place in zip(kind, places, strict=True):
            by_id[id(tensor)] = place.view(tensor.dtype).view(tensor.shape)
    return [by_id[id(tensor)] for tensor in tensors]


def take_places(sizes: Sequence[int], *, pinned: bool) -> list[Tensor]:
    """Allocate uninitialized host memory, (size,) uint8 for each of `sizes`, in the chunks of `lay_out`."""
    chunks, places = lay_out(sizes)
    memory = [take_chunk(size, pinned=pinned) for size in chunks]
    return [memory[chunk][first : first + size] for size, (chunk, first) in zip(sizes, places, strict=True)]


def take_chunk(size: int, *, pinned: bool) -> Tensor:
    """Allocate (size,) uint8."""
    import torch

    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


def _kinds(tensors: Sequence[Tensor]) -> dict[bool, list[Tensor]]:
    """Group tensors by whether they are on a GPU; 8-bit optimizers have both."""
    kinds: dict[bool, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.device.type == "cuda", []).append(tensor)
    return kinds


def _power_from(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the host memory available without swapping, in bytes; None if it is unknown.

    It is the minimum of what the kernel and the limits of the process' cgroups (SLURM's --mem, a container's) leave.
    """
    lines = _lines(proc / "meminfo")
    by_kernel = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*by_kernel, *_by_cgroups(proc, cgroups)], default=None)


def processes_here() -> int:
    """Return the number of the run's processes on this node, from the environment that torch's agent sets."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _by_cgroups(proc: Path, root: Path) -> Iterator[int]:
    """Yield what each cgroup of the process, and each above it, has left to its limit.

    In a container the kernel may give a path that the container does not see; its cgroup is the root there.
    """
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        folder = top / path.lstrip("/")
        while folder.is_relative_to(top):
            yield from _left(folder)
            folder = folder.parent


def _left(folder: Path) -> Iterator[int]:
    for limit_name, current_name in _LIMITS.items():
        limit, current = (next(iter(_lines(folder / name)), "") for name in (limit_name, current_name))
        if not limit.isdecimal() or not current.isdecimal():  # `max`, or no such file.
            continue
        # Pages of files that it has read count as its own until something else wants them.
        stat = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
        prefix = "total_" if "total_inactive_file" in stat else ""
        cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
        yield max(int(limit) - int(current) + cached, 0)


def _lines(path: Path) -> list[str]:
    """Return the lines of a file; none if there is no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
