"""Allocate host memory for copies with little waste, and measure what the node or a limit leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distlora.system import host_memory
from distlora.system.host_memory import CHUNK_BYTES, available_bytes, bytes_like, lay_out, memory_like

MIB = 2**20


def test_gpu_and_cpu_tensors_share_two_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the order of an 8-bit optimizer's states: one CPU step counter, then two GPU tensors."""
    taken: list[tuple[int, bool]] = []

    def take(size: int, *, pinned: bool) -> torch.Tensor:
        taken.append((size, pinned))
        return torch.zeros(size, dtype=torch.uint8)

    monkeypatch.setattr(host_memory, "take_chunk", take)
    with FakeTensorMode():
        kinds = [torch.empty((), device="cpu"), torch.empty(7, 5, device="cuda", dtype=torch.bfloat16)]
        tensors = [tensor.clone() for _ in range(50) for tensor in kinds]
    held = memory_like(tensors)
    assert sorted(taken) == [(CHUNK_BYTES, False), (CHUNK_BYTES, True)]
    assert bytes_like(tensors) == 2 * CHUNK_BYTES
    for number, (own, tensor) in enumerate(zip(held, tensors, strict=True)):
        assert (own.shape, own.dtype) == (tensor.shape, tensor.dtype)
        own.fill_(number)
    assert all(bool((own == number).all()) for number, own in enumerate(held)), "none lies in another"


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ([71 * MIB] * 600, 1.1),  # A rank's rows of 32B on eight: each by itself would take 128 MiB.
        ([668 * MIB] * 2 + [37 * MIB] * 240 + [10 * MIB] * 160 + [MIB] * 160, 1.01),  # Of 70B on three, largest first.
        ([MIB // 2] * 900 + [100], 1.2),
        ([300 * MIB, 64, 20 * MIB, 1000], 1.8),
        ([2048 * MIB, 71 * MIB, 71 * MIB], 1.1),
        ([0, 4, 0], CHUNK_BYTES / 4),
    ],
)
def test_chunks_are_powers_of_two_with_little_waste(sizes: list[int], most: float) -> None:
    chunks, places = lay_out(sizes)
    assert all(size.bit_count() == 1 and size >= CHUNK_BYTES for size in chunks)
    assert sum(chunks) <= most * sum(sizes)
    ends = [0] * len(chunks)
    for size, (chunk, first) in zip(sizes, places, strict=True):
        assert first % 64 == 0
        assert first >= ends[chunk]
        ends[chunk] = first + size
    assert all(end <= size for end, size in zip(ends, chunks, strict=True))


@pytest.mark.parametrize("version", [1, 2])
def test_lower_cgroup_limit_counts(tmp_path: Path, version: int) -> None:
    """Check a job's limit above an unlimited task; cached file pages count as available."""
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    top, limit, current, prefix = (
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        if version == 1
        else (root, "memory.max", "memory.current", "")
    )
    job = top / "job_7"
    (job / "task_0").mkdir(parents=True)
    (proc / "self").mkdir(parents=True)
    assert available_bytes(proc, root) is None
    (proc / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 9000 kB\n")
    assert available_bytes(proc, root) == 9000 * 1024
    line = "4:memory:/job_7/task_0" if version == 1 else "0::/job_7/task_0"
    (proc / "self" / "cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    (job / limit).write_text("5000000\n")
    (job / current).write_text("4000000\n")
    (job / "memory.stat").write_text(f"anon 1\n{prefix}inactive_file 1000\n{prefix}active_file 200\n")
    (job / "task_0" / limit).write_text("9223372036854771712\n" if version == 1 else "max\n")
    (job / "task_0" / current).write_text("9\n")
    assert available_bytes(proc, root) == 1_001_200
    (proc / "self" / "cgroup").write_text(line.replace("job_7", "of_the_host"))  # As a container sees it.
    (job / limit).rename(top / limit)
    (job / current).rename(top / current)
    assert available_bytes(proc, root) == 1_000_000
