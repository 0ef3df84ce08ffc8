"""Every kernel compiles for every GPU within its bounds, and a broken bound is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.tiers import ci

ROOT = Path(__file__).parents[2]
TOOL = "tests/tools/compiled_kernels.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that compiles kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "tests" / "tools")])
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ci(["--every", "1"], 22),
        pytest.param([], 400, marks=pytest.mark.slow),
    ],
    ids=["each kernel", "all"],
)
def test_every_kernel_keeps_its_bounds(options: list[str], least: int, subtests: pytest.Subtests) -> None:
    ended = run(TOOL, "--json", *options)
    assert ended.stdout, ended.stderr
    reports = json.loads(ended.stdout)
    assert len(reports) >= least
    for report in reports:
        with subtests.test(f"{report['name']} on sm_{report['arch']}"):
            assert not report["broken"]
    assert ended.returncode == 0, ended.stderr


CASES = """
import triton
import triton.language as tl
from compiled_kernels import compile_all
from kernel_cases import Case


@triton.jit
def scale(x_ptr, y_ptr, n, FACTOR, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, x * FACTOR + 1.0, mask=at < n)


@triton.jit
def dot(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x))


ALIGNED = {"x_ptr": "*bf16:16", "y_ptr": "*bf16:16"}
SCALE = ALIGNED | {"n": "i64:16", "FACTOR": "fp32"}
WIDE = {"loads_128": True, "stores_128": True, "elements": 4096, "constants": {"BLOCK": 4096}, "kernel": scale}
DOT = {"kernel": dot, "signature": ALIGNED, "constants": {"N": 128}}
for report in compile_all([
    Case(name="wide", signature=SCALE, most_instructions=8, **WIDE),
    Case(name="narrow", signature=SCALE | {"x_ptr": "*bf16", "y_ptr": "*bf16"}, archs=(90,), most_instructions=1,
         least_programs=99, matrix=True, **WIDE),
    Case(name="dot", archs=(90,), matrix=True, **DOT),
    Case(name="dot of 80", archs=(80,), matrix=True, options={"maxnreg": 40}, **DOT),
    Case(name="wrong", archs=(90,), kernel=dot, signature=ALIGNED, constants={"N": 100}),
]):
    print(report.line())
"""


@pytest.mark.ci
def test_what_the_compiler_did_is_reported(tmp_path: Path) -> None:
    (tmp_path / "cases.py").write_text(CASES)  # A file, since triton reads a kernel's source.
    ended = run(str(tmp_path / "cases.py"))
    assert ended.returncode == 0, ended.stderr
    blocks: dict[str, list[str]] = {}
    for line in ended.stdout.splitlines():
        blocks.setdefault(line.partition(":")[0] if line[0] != " " else [*blocks][-1], []).append(line)
    # 4096 elements, 128 threads: 32 each, whose 64 bytes are 4 loads and 4 stores.
    for arch in (80, 89, 90):
        (figures,) = blocks[f"wide, sm_{arch}"]
        assert "16-byte loads 4/4, stores 4/4" in figures
    broken = "\n".join(blocks["narrow, sm_90"])
    for text in ("16-byte global load", "16-byte global store", "instructions per element, at most 1"):
        assert text in broken
    assert "programs on a multiprocessor, at least 99" in broken
    assert "no matrix instruction (HGMMA)" in broken
    assert len(blocks["dot, sm_90"]) == 1
    assert " HGMMA" in blocks["dot, sm_90"][0]
    spills, *others = blocks["dot of 80, sm_80"][1:]
    assert "BROKEN: spills" in spills
    assert not others
    assert "BROKEN: does not compile: " in blocks["wrong, sm_90"][1]


def test_the_table_is_not_made_in_the_interpreter() -> None:
    ended = run(
        "-c", f"import os, runpy; os.environ['TRITON_INTERPRET'] = '1'; runpy.run_path({TOOL!r}, run_name='__main__')"
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "TRITON_INTERPRET is set" in ended.stderr
