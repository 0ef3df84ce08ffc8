"""Compile the Triton kernels for four GPU generations without a GPU, and check registers, spills and instructions.

    python tests/tools/compiled_kernels.py [--only TEXT] [--arch 90 ...]

Prints a line per kernel and arch: registers and spilled bytes per thread, KiB of shared memory per program, programs
that a multiprocessor holds at once, SASS instructions (and per element), 16-byte loads and stores of all, and matrix
instructions. The exit status is 1 if one breaks a bound (kernel_cases.py). A compilation takes 0.7 s of a core.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from kernel_cases import ALL_ARCHS, Case, all_cases
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}
"""Shared memory per program (A100; L40S, RTX 4090; H100, H200; B200); a multiprocessor has 1 KiB more, and each program
reserves 1 KiB."""
THREADS = {80: 2048, 89: 1536, 90: 2048, 100: 2048}
PROGRAMS = {80: 32, 89: 24, 90: 32, 100: 32}
REGISTERS = 65536
"""Limits of a multiprocessor; registers are allocated in units of 8 per thread."""

CLASSES = {
    "loads": r"LDG\.|LDGSTS\.",
    "wide loads": r"LDG\.E\S*\.(?:128|256)|LDGSTS\.E\S*\.128|UTMALDG",
    "stores": r"STG\.",
    "wide stores": r"STG\.E\S*\.(?:128|256)|UTMASTG",
    "HGMMA": r"HGMMA\.",
    "HMMA": r"HMMA\.",
    "UTCMMA": r"UTC\w*MMA",
}
"""Pattern of SASS mnemonics by class."""
# `/*0a40*/  @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;`: address, predicate, mnemonic.
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Figures of one case compiled for one arch. With `error` it did not compile and the rest is 0."""

    name: str
    arch: int
    error: str = ""
    registers: int = 0
    spilled: int = 0
    """Spilled bytes per thread, stores and loads, as ptxas counts them."""
    shared: int = 0
    """Bytes of shared memory per program."""
    programs: int = 0
    """Programs that a multiprocessor holds at once; 0 if the shared memory of one does not fit."""
    instructions: int = 0
    """SASS instructions of the kernel, without padding."""
    per_element: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict)
    """Instructions by class."""
    broken: Sequence[str] = ()
    """The broken bounds, a sentence each."""

    def line(self) -> str:
        """Return the figures in a line, and the broken bounds below it."""
        loads, stores = (f"{self.counts.get(f'wide {each}')}/{self.counts.get(each)}" for each in ("loads", "stores"))
        matrix = " ".join(
            f"{self.counts[each]} {each}" for each in ("HGMMA", "HMMA", "UTCMMA") if self.counts.get(each)
        )
        text = (
            f"{self.name}, sm_{self.arch}: {self.registers} registers, {self.spilled} spilled, "
            f"{self.shared / 1024:.1f} KiB, {self.programs} programs, {self.instructions} instructions "
            f"({self.per_element:.1f} per element), "
            f"16-byte loads {loads}, stores {stores} {matrix}"
        )
        return "\n".join([text.rstrip(), *(f"  BROKEN: {each}" for each in self.broken)])


def broken_bounds(report: Report, case: Case) -> list[str]:
    """Return the broken bounds, one sentence each."""
    if report.error:
        return [f"does not compile: {report.error}"]
    counts, limit = report.counts, SHARED_KIB[report.arch] * 1024
    matrix = "HGMMA" if case.archs == (90,) else "HGMMA HMMA UTCMMA"
    most = case.most_instructions if report.arch == 90 else None
    bounds = {
        f"spills {report.spilled} bytes per thread": report.spilled,
        f"needs {report.shared:,} bytes of shared memory, of {limit:,}": report.shared > limit,
        f"runs {report.per_element:.2f} instructions per element, at most {most}": most and report.per_element > most,
        f"fits {report.programs} programs on a multiprocessor, at least {case.least_programs}": (
            report.programs < case.least_programs
        ),
        "has no 16-byte global load": case.loads_128 and not counts["wide loads"],
        "has no 16-byte global store": case.stores_128 and not counts["wide stores"],
        f"has no matrix instruction ({matrix})": case.matrix and not any(counts[each] for each in matrix.split()),
    }
    return [text for text, is_broken in bounds.items() if is_broken]


def compile_case(case: Case, arch: int) -> Report:
    """Compile a case for an arch and check its bounds. A compiler error is in the report."""
    # Triton 3.10 turns fusion off by default; a launch without the option has it on until then.
    options = {"enable_fp_fusion": True, **case.options, "num_warps": case.num_warps, "num_stages": case.num_stages}
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True  # Of the call that makes the cubin, so with Triton's ptxas and options.
        knobs.compilation.always_compile = True  # A cached kernel has no log.
        try:
            kernel: Any = triton.compile(source_of(case), target=GPUTarget("cuda", arch, 32), options=options)
        except Exception as error:  # Each stage of the compiler has its own.
            report = Report(name=case.name, arch=arch, error=" ".join(f"{type(error).__name__}: {error}".split())[:400])
            return dataclasses.replace(report, broken=broken_bounds(report, case))
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    used = re.search(r"Used (\d+) registers", log.getvalue())
    if spills is None or used is None:
        raise RuntimeError(f"ptxas' log of {case.name} on sm_{arch} lacks spills or registers:\n{log.getvalue()}")
    words, threads, shared = Counter(mnemonics(kernel.asm["cubin"])), 32 * case.num_warps, kernel.metadata.shared
    by_registers = REGISTERS // (-(-int(used[1]) // 8) * 8 * threads)
    by_shared = (SHARED_KIB[arch] + 1) * 1024 // (shared + 1024)
    report = Report(
        name=case.name,
        arch=arch,
        registers=int(used[1]),
        spilled=int(spills[1]) + int(spills[2]),
        shared=shared,
        programs=min(by_registers, by_shared, THREADS[arch] // threads, PROGRAMS[arch]),
        instructions=words.total(),
        per_element=words.total() * threads / case.elements if case.elements else 0.0,
        counts={
            name: sum(number for word, number in words.items() if re.match(form, word))
            for name, form in CLASSES.items()
        },
    )
    return dataclasses.replace(report, broken=broken_bounds(report, case))


def source_of(case: Case) -> ASTSource:
    """Return the kernel with its arguments' types. Raises ValueError if they do not fit the kernel."""
    if {*case.signature, *case.constants} != {*case.kernel.arg_names}:
        raise ValueError(f"{case.name}: {[*case.signature, *case.constants]} are not {case.kernel.arg_names}")
    types, constants, attributes = {}, {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        kind, _, special = case.signature.get(name, "constexpr").partition(":")
        types[name] = "constexpr" if special == "1" else kind
        if types[name] == "constexpr":
            constants[(index,)] = 1 if special == "1" else case.constants[name]
        elif special == "16":
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=case.kernel, signature=types, constexprs=constants, attrs=attributes)


def mnemonics(cubin: bytes) -> list[str]:
    """Return the SASS instructions of a cubin in order, without padding."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run([tool, "-c", "-ndf", file.name], capture_output=True, text=True, check=True).stdout
    instructions = [match[1] for match in map(INSTRUCTION.search, sass.splitlines()) if match is not None]
    return [word for word in instructions if word != "NOP"]


CASES: list[Case] = []
"""The chosen cases. They hold functions and cannot be pickled: forked processes have them."""


def compile_job(job: tuple[int, int]) -> Report:
    """Compile the case of an index for an arch."""
    return compile_case(CASES[job[0]], job[1])


def compile_all(cases: Sequence[Case], archs: Sequence[int] = ALL_ARCHS) -> list[Report]:
    """Return a report for each case and each arch that it has, in order."""
    CASES[:] = cases
    jobs = [(index, arch) for index, case in enumerate(cases) for arch in case.archs if arch in archs]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        with multiprocessing.get_context("fork").Pool(min(8, len(os.sched_getaffinity(0)))) as pool:
            return pool.map(compile_job, jobs, chunksize=1)


def first_of_each(cases: Sequence[Case], every: int) -> list[Case]:
    """Return the first case of every n-th kernel, for sm_89 (least shared memory) and sm_90 (has HGMMA) in turns."""
    firsts = list({case.kernel: case for case in reversed(cases)}.values())[::-1][::every]
    both = [{89, 90} <= {*case.archs} for case in firsts]
    return [
        dataclasses.replace(case, archs=(89, 90)[number % 2 :][:1]) if both[number] else case
        for number, case in enumerate(firsts)
    ]


def main() -> int:
    """Compile, print and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", default="", help="kernels with TEXT in their name")
    parser.add_argument("--arch", type=int, nargs="+", choices=ALL_ARCHS, default=ALL_ARCHS, help="these archs alone")
    parser.add_argument("--every", type=int, metavar="N", help="one case of every n-th kernel, on sm_89 or sm_90")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, so kernels are interpreted; unset it to compile them")
    cases = [case for case in all_cases() if options.only in case.name]
    archs = options.arch if options.every is None else (89, 90)
    reports = compile_all(cases if options.every is None else first_of_each(cases, options.every), archs)
    if options.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports], indent=1))
    else:
        print("\n".join(report.line() for report in reports))
    return int(any(report.broken for report in reports))


if __name__ == "__main__":
    sys.exit(main())
