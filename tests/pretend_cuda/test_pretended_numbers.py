"""Interpreted kernels on the pretended GPU train as the CPU path does, with fresh memory that is NaN."""

from __future__ import annotations

import re
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


@pytest.mark.slow
def test_replayed_graphs_generate_what_launched_steps_do(tmp_path: Path) -> None:
    """Rows that fill a graph up, another number of rows, and replays of both: equal to the bit."""
    found = groups.in_process("run_paths", tmp_path / "seen.json", "captured llama", mode="run")
    assert found["captured llama"]["error"] is None, found["captured llama"]["error"]


OF_A_GPU = {
    "kernels/test_gpu.py": "test_quantizing_and_dequantizing_on_the_device_equal_the_cpu",
    "kernels/test_dropout.py": "test_a_gpu_drops_what_the_cpu_drops",
    "model/test_attention.py": "test_the_op_on_the_device_equals_its_reference_and_itself",
    "training/test_saving.py": "test_gpu_copies_hold_the_state_when_queued",
}
"""Tests marked `gpu` that take seconds here, by file. Most others train with interpreted kernels for minutes."""


def test_tests_of_a_gpu_run_on_it() -> None:
    names = [f"tests/{file}::{name}" for file, name in OF_A_GPU.items()]
    ended = groups.start("pytest", "-p", "pretend_cuda.plugin", "-q", "-m", "gpu", *names, mode="run")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "7 passed" in ended.stdout, ended.stdout + ended.stderr


CAPTURES = {
    "nothing": r"\[10.0, 10.0, 10.0\]",
    "temporary memory": r"\[15.0, 15.0, 15.0\]",
    "a wait": ".* waits for the device in a capture: item",
    "a size": ".* waits for the device in a capture: nonzero",
    **dict.fromkeys(("a copy from the host", "a copy to the host"), "copy_.* in a capture uses the host's memory"),
    "a number from the host": ".* waits for the device in a capture: copy from the host",
    "freed memory": "a graph reads memory that has been freed",
}
"""What becomes of ones that are 5 at the replay, or the error."""


def test_a_capture_refuses_what_a_gpu_does(tmp_path: Path) -> None:
    found = groups.in_process("refused_captures", tmp_path / "seen.json", mode="run")
    assert found.keys() == CAPTURES.keys()
    for name, pattern in CAPTURES.items():
        assert re.fullmatch(pattern, found[name]), f"{name}: {found[name]}"
