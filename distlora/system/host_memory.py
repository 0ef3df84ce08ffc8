"""Host memory: how much can be had, and chunks of it for many tensors. Imports torch late: the planner asks both."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 64 * 2**20
"""Least of what is taken at once. Chunks are powers of two, to which torch rounds pinned memory up."""
TENSORS_IN_A_CHUNK = 8
"""Of the largest, at least, where there are so many: what does not fit at a chunk's end is lost."""
ALIGNMENT = 64

_LIMITS = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
"""Of a cgroup, version 2 and 1: its limit, what it has."""


def lay_out(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Places for tensors of so many bytes: (bytes of each chunk, (chunk, first byte) of each tensor)."""
    chunks: list[int] = []
    places: list[tuple[int, int]] = []
    needs = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    left, used, several = sum(needs), 0, _power_from(TENSORS_IN_A_CHUNK * max(needs, default=0))
    for need in needs:
        if not chunks or used + need > chunks[-1]:
            chunks.append(max(CHUNK_BYTES, _power_from(need), min(several, _power_to(left))))
            used = 0
        places.append((len(chunks) - 1, used))
        used += need
        left -= need
    return chunks, places


def bytes_of(sizes: Sequence[int]) -> int:
    """What `take_places` takes."""
    return sum(lay_out(sizes)[0])


def bytes_like(tensors: Sequence[Tensor]) -> int:
    """What `memory_like` takes."""
    return sum(bytes_of([tensor.nbytes for tensor in kind]) for kind in _kinds(tensors).values())


def memory_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialized host memory of each tensor's shape and dtype, contiguous; pinned for those of a GPU."""
    found: dict[int, Tensor] = {}
    for pinned, kind in _kinds(tensors).items():
        places = take_places([tensor.nbytes for tensor in kind], pinned=pinned)
        for tensor, place in zip(kind, places, strict=True):
            found[id(tensor)] = place.view(tensor.dtype).view(tensor.shape)
    return [found[id(tensor)] for tensor in tensors]


def take_places(sizes: Sequence[int], *, pinned: bool) -> list[Tensor]:
    """Uninitialized host memory, (size,) uint8 for each of `sizes`, in the chunks of `lay_out`."""
    chunks, places = lay_out(sizes)
    memory = [take_chunk(size, pinned=pinned) for size in chunks]
    return [memory[chunk][first : first + size] for size, (chunk, first) in zip(sizes, places, strict=True)]


def take_chunk(size: int, *, pinned: bool) -> Tensor:
    """(size,) uint8."""
    import torch

    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


def _kinds(tensors: Sequence[Tensor]) -> dict[bool, list[Tensor]]:
    """By whether they are a GPU's; an optimizer of 8 bits has both, in turn."""
    kinds: dict[bool, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.device.type == "cuda", []).append(tensor)
    return kinds


def _power_from(size: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(size - 1, 0).bit_length()


def _power_to(size: int) -> int:
    """The largest power of two that is not above; 1 of nothing."""
    return 1 << max(size.bit_length() - 1, 0)


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Host memory that can be had without swapping, by the kernel and by the limits of the process' cgroups (SLURM's
    --mem, a container's); None where nothing says.
    """
    found = [*_by_kernel(proc), *_by_cgroups(proc, cgroups)]
    return min(found, default=None)


def processes_here() -> int:
    """Processes of the run on this machine, which share its memory; torchrun says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _by_kernel(proc: Path) -> Iterator[int]:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _by_cgroups(proc: Path, root: Path) -> Iterator[int]:
    """What each cgroup that the process is in, and each above it, has left to its limit. In a container the kernel may
    tell a path that the container does not see; its own cgroup is the root there."""
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
    """Of a file; none where there is no such file, as on other systems than Linux."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
