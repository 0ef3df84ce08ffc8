"""Interpreted kernels on the pretended GPU train as the CPU path does, with fresh memory that is NaN."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretend_cuda import groups
from support.tiers import ci

RELATIVE = 0.01
"""Largest difference of losses and gradient norms in bf16: the paths round at other places."""


@pytest.mark.parametrize(
    ("name", "sequences"), [("qlora", 1), ("keep mxfp4", 2), ("type qwen3_moe", 2), ci("keep fp8", 2)]
)
def test_two_steps_equal_the_cpu_path(name: str, sequences: int, tmp_path: Path) -> None:
    """With one sequence, rounding in the first step makes a router choose other experts in the second."""
    found = groups.in_process("run_paths", tmp_path / "seen.json", "--beside-cpu", str(sequences), name, mode="run")
    seen = found[name]
    assert seen["error"] is None, seen["error"]
    assert len(seen["steps"]) == 2
    for ours, theirs in zip(seen["steps"], seen["cpu_steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=RELATIVE), "(loss, gradient norm) on the GPU and on the CPU"


@pytest.mark.ci
def test_tests_of_a_gpu_run_on_it() -> None:
    arguments = ("-p", "pretend_cuda.plugin", "-q", "-m", "gpu", "tests/kernels/test_gpu.py", "-k", "quantizing")
    ended = groups.start("pytest", *arguments, mode="run")
    assert "3 passed" in ended.stdout, ended.stdout + ended.stderr
