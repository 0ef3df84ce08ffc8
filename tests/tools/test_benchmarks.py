"""Each benchmark runs at a small size and prints what it measures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import CALLERS_COMPILER

ROOT = Path(__file__).parents[2]


def run(*words: str, **variables: str) -> str:
    """Run Python in the checkout, without GPUs and outside Triton's interpreter, and return its stdout."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CXX")}
    kept |= {} if CALLERS_COMPILER is None else {"CXX": CALLERS_COMPILER}
    kept |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=kept)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return ended.stdout


@pytest.mark.ci
def test_every_row_of_the_kernels_is_right_in_the_interpreter() -> None:
    code = "import sys; from support import triton_interpreter; import gpu_kernels; sys.exit(gpu_kernels.main())"
    paths = os.pathsep.join(str(ROOT / name) for name in ("kernels", "launcher", ".", "tests", "benchmarks"))
    words = ("--device", "cpu", "--shapes", "128x64+66x64,128x64", "--m", "5", "--r", "3")
    printed = run("-c", code, *words, PYTHONPATH=paths)
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[1] != "M"]
    names = {row[3] if row[0] != row[2] else row[2] for row in rows if len(row) > 4}
    assert {"ours, scratch", "ours, fused", "ours, fused GEMM alone", "Unsloth sequence", "transformers"} < names
    tasks = {word for row in rows for word in row}
    assert {f"{name} to bf16" for name in ("nf4", "nf4_absmax", "mxfp4", "q4_K")} < tasks
    assert {"x A^T", "dY B, dB", "RMSNorm", "cross-entropy", "forward + backward, Q4_0"} < tasks
    assert not [row for row in rows if "no figures" not in row]
