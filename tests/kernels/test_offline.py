"""Every kernel compiles for every GPU within its bounds, and a broken bound is reported."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distlora_kernels.offline import ARCHS, Case, Report, all_cases, check
from support.tiers import ci

KERNELS = Path(__file__).parents[2] / "kernels"

COMPILED = Report(
    name="x",
    arch=90,
    registers=64,
    shared_limit=ARCHS[90].shared_kib * 1024,
    programs_per_sm=4,
    threads=128,
    instructions=320,
    per_element=10.0,
    counts={"LDG": 3, "LDG.128": 0, "LDGSTS": 0, "LDGSTS.128": 0, "STG": 2, "STG.128": 0, "TMA": 0}
    | {"HGMMA": 0, "HMMA": 4, "UTCMMA": 0},
)

KERNELS_OF_TESTS = """
import json, dataclasses
import triton
import triton.language as tl
from distlora_kernels.offline import Case, check
from distlora_kernels.offline_compile import compile_all, table, verdict


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
CASES = [
    Case(name="wide", kernel=scale, signature=SCALE, constants={"BLOCK": 4096}, num_warps=4,
         bounds={"elements": 4096, "loads_128": True, "stores_128": True, "max_instructions_per_element": {90: 8}}),
    Case(name="narrow", kernel=scale, signature=SCALE | {"x_ptr": "*bf16"}, constants={"BLOCK": 4096}, num_warps=4,
         archs=(90,), bounds={"elements": 4096, "loads_128": True, "stores_128": True}),
    Case(name="dot", kernel=dot, signature=ALIGNED, constants={"N": 128}, num_warps=4, archs=(80, 90),
         bounds={"hgmma": True, "mma": True}),
    Case(name="dot spills", kernel=dot, signature=ALIGNED, constants={"N": 128}, num_warps=4, archs=(80,),
         options={"maxnreg": 40}),
    Case(name="wrong", kernel=dot, signature=ALIGNED, constants={"N": 100}, num_warps=4, archs=(90,)),
]
reports = compile_all(CASES)
broken = {(r.name, r.arch): check(r, next(c for c in CASES if c.name == r.name)) for r in reports}
print(json.dumps({
    "reports": {f"{r.name} {r.arch}": dataclasses.asdict(r) for r in reports},
    "broken": {f"{name} {arch}": texts for (name, arch), texts in broken.items()},
    "table": table(reports), "verdict": verdict(reports, broken),
}))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that compiles kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment | {"PYTHONPATH": str(KERNELS)}
    )


SOME = """
import collections, dataclasses, sys
from distlora_kernels import offline, offline_compile

of_kernel = collections.defaultdict(list)
for case in offline.all_cases():
    of_kernel[case.kernel].append(case)
cases = [group[0] for group in of_kernel.values()][:: int(sys.argv[1])]
offline_compile.all_cases = lambda: [
    dataclasses.replace(case, archs=(89, 90)[number % 2 :][:1]) if {89, 90} <= {*case.archs} else case
    for number, case in enumerate(cases)
]
raise SystemExit(offline_compile.main(["--json", "--arch", "89", "90"]))
"""
"""The first specialization of every n-th kernel, on sm_89 (least shared memory) and sm_90 (has HGMMA) in turns.

A compilation takes 0.7 s of a core.
"""


@pytest.mark.parametrize(
    ("archs", "command"),
    [
        ((89, 90), ["-c", SOME, "5"]),
        ci((89, 90), ["-c", SOME, "1"]),
        pytest.param((80, 89, 90, 100), ["-m", "distlora_kernels.offline", "--json"], marks=pytest.mark.slow),
    ],
    ids=["some", "each kernel", "all"],
)
def test_every_kernel_keeps_its_bounds(archs: tuple[int, ...], command: list[str], subtests: pytest.Subtests) -> None:
    ended = run(*command)
    assert ended.stdout, ended.stderr
    reports = json.loads(ended.stdout)["reports"]
    found = [(report["name"], report["arch"]) for report in reports]
    expected = [(case.name, arch) for case in all_cases() for arch in case.archs if arch in archs]
    if command[0] == "-m":
        assert found == expected
    else:
        assert set(found) <= set(expected)
        kernel_of = {case.name: case.kernel for case in all_cases()}
        kernels = len({kernel_of[name] for name, _ in expected})
        assert len({kernel_of[name] for name, _ in found}) == -(-kernels // int(command[-1]))
    for report in reports:
        with subtests.test(f"{report['name']} on sm_{report['arch']}"):
            assert not report["broken"], f"{report['name']} on sm_{report['arch']}: {'; '.join(report['broken'])}"
    assert ended.returncode == int(any(report["broken"] for report in reports)), ended.stderr


@pytest.mark.ci
def test_what_the_compiler_did_is_reported(tmp_path: Path) -> None:
    # A file, since triton reads a kernel's source.
    (tmp_path / "cases.py").write_text(KERNELS_OF_TESTS)
    ended = run(str(tmp_path / "cases.py"))
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    reports, broken = found["reports"], found["broken"]

    assert not any(texts for name, texts in broken.items() if name.startswith(("wide", "dot 9")))
    # 4096 elements, 128 threads: 32 each, whose 64 bytes are 4 loads and 4 stores.
    for arch in (80, 89, 90):
        counts = reports[f"wide {arch}"]["counts"]
        assert (counts["LDG.128"], counts["LDG"], counts["STG.128"], counts["STG"]) == (4, 4, 4, 4)
    assert broken["narrow 90"] == [f"has no 128-bit global load among its {reports['narrow 90']['counts']['LDG']}"]
    assert reports["dot 90"]["counts"]["HGMMA"] > 0 == reports["dot 90"]["counts"]["HMMA"]
    assert reports["dot 80"]["counts"]["HMMA"] > 0 == reports["dot 80"]["counts"]["HGMMA"]
    spilled = reports["dot spills 80"]["spill_bytes"]
    assert broken["dot spills 80"] == [f"spills {spilled} bytes per thread to local memory; it must spill none"]
    assert broken["wrong 90"][0].startswith("does not compile: ")
    assert f"BROKEN  dot spills on sm_80: {broken['dot spills 80'][0]}" in found["verdict"]
    assert sum(line.startswith("wide") for line in found["table"].splitlines()) == 1


@pytest.mark.parametrize(
    ("bounds", "change", "message"),
    [
        ({"elements": 1, "max_instructions_per_element": 8}, {}, "runs 10.00 instructions per element; at most 8"),
        ({"elements": 1, "max_instructions_per_element": {90: 10, 80: 8}}, {}, None),
        ({"max_registers": 63}, {}, "takes 64 registers per thread; at most 63"),
        ({"min_programs_per_sm": 5}, {}, "fits 4 programs on a multiprocessor; at least 5"),
        ({"loads_128": True}, {}, "has no 128-bit global load among its 3"),
        ({"loads_128": True}, {"LDGSTS": 1, "LDGSTS.128": 1}, None),
        ({"loads_128": True, "stores_128": True}, {"TMA": 2}, None),
        ({"stores_128": True}, {}, "has no 128-bit global store among its 2"),
        ({"stores_128": True}, {"STG.128": 1}, None),
        ({"hgmma": True}, {}, "has no warpgroup matrix instruction (HGMMA)"),
        ({"mma": True}, {}, None),
        ({"mma": True}, {"HMMA": 0}, "has no matrix instruction"),
    ],
)
def test_bounds(bounds: dict[str, object], change: dict[str, int], message: str | None) -> None:
    report = dataclasses.replace(COMPILED, counts=COMPILED.counts | change)
    case = Case(name="x", kernel=None, signature={}, constants={}, num_warps=4, bounds=bounds)
    assert check(report, case) == ([] if message is None else [message])


def test_bounds_that_mean_nothing_are_refused() -> None:
    case = Case(name="x", kernel=None, signature={}, constants={}, num_warps=4, bounds={"load_128": True})
    with pytest.raises(ValueError, match=r"'x' has unknown bounds \['load_128'\]; known are elements,"):
        check(COMPILED, case)
    case = dataclasses.replace(case, bounds={"max_instructions_per_element": 8})
    with pytest.raises(ValueError, match="lacks `elements`"):
        check(dataclasses.replace(COMPILED, per_element=None), case)


def test_the_table_is_not_made_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "distlora_kernels.offline"]
    environment = os.environ | {"PYTHONPATH": str(KERNELS), "TRITON_INTERPRET": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "TRITON_INTERPRET is set" in ended.stderr
