"""Define the kernels' offline cases and their bounds: registers, spills and instructions, checked without a GPU.

`python -m distlora_kernels.offline` compiles all cases with Triton's compiler (offline_compile.py), prints a table, and
exits with 1 if one breaks a bound. TRITON_INTERPRET must not be set: a process either compiles or interprets kernels.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Arch(NamedTuple):
    """Limits of a multiprocessor (CUDA programming guide, technical specifications per compute capability)."""

    gpus: str
    shared_kib: int
    """Shared memory per program, in KiB; a multiprocessor has 1 KiB more, and each program reserves 1 KiB."""
    threads: int
    programs: int


ARCHS: dict[int, Arch] = {
    80: Arch("A100", 163, 2048, 32),
    89: Arch("L40S, RTX 4090", 99, 1536, 24),
    90: Arch("H100, H200", 227, 2048, 32),
    100: Arch("B200", 227, 2048, 32),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One specialization of a kernel, as it would be launched on a GPU, and its bounds.

    Every module of Triton kernels has a tuple OFFLINE of cases, one for each specialization that runs at full size.
    """

    name: str
    """Unique name in the table: `dequantize bf16`, `linear M=16`."""
    kernel: Any
    """The @triton.jit function."""
    signature: Mapping[str, str]
    """Type by argument: `*bf16:16` for a pointer or number divisible by 16, `i32:1` for the number 1. Without
    constants."""
    constants: Mapping[str, Any]
    """Values of the tl.constexpr arguments, and arguments that are None."""
    num_warps: int
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further launch options: enable_fp_fusion=False, maxnreg=128. Fusion is on by default, as in a launch."""
    archs: tuple[int, ...] = (80, 89, 90, 100)
    bounds: Mapping[str, Any] = field(default_factory=dict)
    """Bounds besides `no spills` and `shared memory fits`, which always hold. A number may be a mapping from arch to
    number, and then holds on these archs only.

    elements: weights or outputs per program (in a kernel with a loop, per iteration); not a bound, but needed for
        instructions per element.
    max_instructions_per_element: SASS instructions of a thread per element, each counted once.
    max_registers: registers per thread.
    min_programs_per_sm: programs that fit a multiprocessor at once, by registers, shared memory and threads.
    loads_128, stores_128: True if some global loads (stores) must move 16 bytes per thread, or use TMA.
    hgmma: True if sm_90 must use warpgroup matrix instructions.
    mma: True if every arch must use a matrix instruction.
    """


BOUNDS = (
    "elements",
    "max_instructions_per_element",
    "max_registers",
    "min_programs_per_sm",
    "loads_128",
    "stores_128",
    "hgmma",
    "mma",
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Figures of one case compiled for one arch. With `error` it did not compile and the rest is 0."""

    name: str
    arch: int
    error: str = ""
    registers: int = 0
    """Registers per thread."""
    spill_bytes: int = 0
    """Spilled bytes per thread, stores and loads, as ptxas counts them."""
    shared_bytes: int = 0
    shared_limit: int = 0
    programs_per_sm: int = 0
    threads: int = 0
    """Threads per program."""
    instructions: int = 0
    """SASS instructions of the kernel, without padding."""
    per_element: float | None = None
    """instructions * threads / bounds["elements"]."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Instructions by class: the keys of offline_compile.CLASSES."""
    wgmma_serialized: bool = False
    """True if ptxas reports serialized warpgroup matrix instructions (C7515): a hint, as plain bf16 GEMMs have it."""
    seconds: float = 0.0


def check(report: Report, case: Case) -> list[str]:
    """Return the broken bounds, one sentence each. ValueError for an unknown bound."""
    unknown = sorted(set(case.bounds) - set(BOUNDS))
    if unknown:
        raise ValueError(f"case {case.name!r} has unknown bounds {unknown}; known are {', '.join(BOUNDS)}")
    if report.error:
        return [f"does not compile: {report.error}"]
    broken = []
    if report.spill_bytes:
        broken.append(f"spills {report.spill_bytes} bytes per thread to local memory; it must spill none")
    if report.shared_bytes > report.shared_limit:
        broken.append(
            f"needs {report.shared_bytes:,} bytes of shared memory; sm_{report.arch} has {report.shared_limit:,}"
        )

    def bound(name: str) -> Any:
        value = case.bounds.get(name)
        return value.get(report.arch) if isinstance(value, Mapping) else value

    most, registers, programs = (
        bound(name) for name in ("max_instructions_per_element", "max_registers", "min_programs_per_sm")
    )
    if most is not None and report.per_element is None:
        raise ValueError(f"case {case.name!r} bounds instructions per element and lacks `elements`")
    if most is not None and report.per_element is not None and report.per_element > most:
        broken.append(f"runs {report.per_element:.2f} instructions per element; at most {most}")
    if registers is not None and report.registers > registers:
        broken.append(f"takes {report.registers} registers per thread; at most {registers}")
    if programs is not None and report.programs_per_sm < programs:
        broken.append(f"fits {report.programs_per_sm} programs on a multiprocessor; at least {programs}")
    counts = report.counts
    if bound("loads_128") and not counts["LDG.128"] + counts["LDGSTS.128"] + counts["TMA"]:
        broken.append(f"has no 128-bit global load among its {counts['LDG'] + counts['LDGSTS']}")
    if bound("stores_128") and not counts["STG.128"] + counts["TMA"]:
        broken.append(f"has no 128-bit global store among its {counts['STG']}")
    if bound("hgmma") and report.arch == 90 and not counts["HGMMA"]:
        broken.append("has no warpgroup matrix instruction (HGMMA)")
    if bound("mma") and not counts["HGMMA"] + counts["HMMA"] + counts["UTCMMA"]:
        broken.append("has no matrix instruction")
    return broken


def all_cases() -> list[Case]:
    """Return the OFFLINE cases of every distlora_kernels.*_triton module, in alphabetical order of the modules.

    AttributeError for a module without OFFLINE; ValueError for two cases with one name.
    """
    package = importlib.import_module("distlora_kernels")
    modules = pkgutil.walk_packages(package.__path__, "distlora_kernels.")
    names = sorted(module.name for module in modules if module.name.endswith("_triton"))
    cases = [case for name in names for case in importlib.import_module(name).OFFLINE]
    twice = sorted({case.name for case in cases if sum(other.name == case.name for other in cases) > 1})
    if twice:
        raise ValueError(f"several cases are named {twice}; give each its own name")
    return cases


if __name__ == "__main__":
    from distlora_kernels.offline_compile import main

    sys.exit(main())
