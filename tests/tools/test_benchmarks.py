"""Each benchmark runs at a small size and prints what it measures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distlora_launcher.cli.main import main
from support.measured import llama, write_random_checkpoint

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("compiler")


def run(*words: str, **variables: str) -> str:
    """Run Python in the checkout, without GPUs and outside Triton's interpreter; its stdout, spaces joined."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=kept)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return re.sub(" +", " ", ended.stdout)


@pytest.mark.ci
def test_every_row_of_the_kernels_is_right_in_the_interpreter() -> None:
    code = "import sys; from support import triton_interpreter; import gpu_kernels; sys.exit(gpu_kernels.main())"
    paths = os.pathsep.join(str(ROOT / name) for name in ("kernels", "launcher", ".", "tests", "benchmarks"))
    words = ("--device", "cpu", "--shapes", "128x64+66x64,128x64", "--m", "5", "--r", "3")
    printed = run("-c", code, *words, PYTHONPATH=paths)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[1] != "M" and row[0].strip("-")]
    names = {row[3] if row[0] != row[2] else row[2] for row in rows if len(row) > 4}
    assert {"ours, scratch", "ours, fused", "ours, fused GEMM alone", "Unsloth sequence", "transformers"} < names
    tasks = {word for row in rows for word in row}
    assert {f"{name} to bf16" for name in ("nf4", "nf4_absmax", "mxfp4", "q4_K")} < tasks
    assert {"x A^T", "dY B, dB", "RMSNorm", "cross-entropy", "forward + backward, Q4_0"} < tasks
    assert not [row for row in rows if "no figures" not in row]


@pytest.mark.ci
def test_ours_and_a_peer_train_the_same_step() -> None:
    words = ("--sizes", "8M", "--ways", "ours,peft-bf16", "--checkpointing", "block", "--rounds", "1", "--tokens", "32")
    printed = run("benchmarks/step.py", *words)
    assert "WARNING" not in printed, "the first losses differ"
    for text in ("8M, 4 x 32 tokens, 1 process", "8M, 4 x 32 tokens, 2 processes", "ours: times as fast"):
        assert text in printed
    assert "times as fast, with" in printed


@pytest.mark.slow
def test_loads_and_saves_are_measured_beside_the_peers() -> None:
    printed = run("benchmarks/load.py", "--layers", "1", "--ranks", "1", "--rounds", "1")
    for text in ("ours, no cache", "ours, from the cache", "transformers + bitsandbytes", "MiB over the weights"):
        assert text in printed
    printed = run("benchmarks/checkpoint.py", "--layers", "1", "--rounds", "1", "--tokens", "16", "--r", "4")
    for text in ("| ours | 1 | 4 |", "| ours | 2 | 4 |", "train.save_in_background=false", "no: no optimizer"):
        assert text in printed


@pytest.mark.ci
def test_generation_is_measured_beside_transformers(tmp_path: Path) -> None:
    settings = llama(vocabulary=1024, hidden=128, inner=256, layers=1, heads=2, kv_heads=2)
    write_random_checkpoint(tmp_path / "model", settings, num_shards=1)
    words = ("--prompts", "1,2", "--tokens", "4", "--rounds", "1", "--threads", "1", "--adapter")
    rows = [
        line
        for line in run("benchmarks/generate.py", str(tmp_path / "model"), *words).splitlines()
        if line[:3] in ("| 1", "| 2")
    ]
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        ([], "python benchmarks/step.py"),
        (["load", "--ranks", "1"], "python benchmarks/load.py"),
        (["kernels", "--offline"], "python tests/tools/compiled_kernels.py"),
        (["memory"], "python -m pytest tests/planner/test_plan_memory.py"),
        (["methods", "MODEL", "DATA"], "distlora sweep adapter=lora,dora,full"),
    ],
)
def test_the_former_command_says_what_to_type(words: list[str], typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert typed in capsys.readouterr().err
