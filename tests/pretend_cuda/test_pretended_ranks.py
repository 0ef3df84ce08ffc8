"""Paths of several GPUs end on the pretended ones, as rank 3 of 8 of torch's fake process group, which moves nothing.

What needs no other rank's values is checked: devices, dtypes, shapes, memory, launches and host waits.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pretend_cuda import groups, paths

ZERO3 = {"distlora/parallel/zero3.py Units._fetch: Event.synchronize"}
"""DeepSpeed frees what the device may still read, so each gather waits (parallel/README.md)."""
SAMPLING = (
    "distlora/generation/",
    "distlora/model/paged_cache.py",
    "distlora/training/rollouts.py",
    "distlora/parallel/backend.py Backend.whole_base",
    "distlora/parallel/fsdp2.py Residency.lacks_memory_for",
)
"""Where waits are that test_pretended_paths.py lists, and where ranks agree whether the whole base fits beside them."""


def test_paths_of_rank_3_of_8(tmp_path: Path, subtests: pytest.Subtests) -> None:
    found = groups.in_process("run_paths", tmp_path / "seen.json", "--ranks", *paths.OF_EIGHT, mode="skip")
    for name, seen in found.items():
        with subtests.test(name):
            assert seen["error"] is None, seen["error"]
            waits = {place for place in seen["waits"] if not (name.startswith("grpo") and place.startswith(SAMPLING))}
            assert waits == (ZERO3 if name.startswith("zero3") else set())
            assert seen["empty"] == [], "these launches have no program"
            assert bool(seen["launches"]) == (not name.startswith("full")), "the kernels are not used"
