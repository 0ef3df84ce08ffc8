"""What a kernel compiles to, without a GPU: registers, spills, instructions, from Triton's own compiler and the tools
in its wheel.

`python -m distlora_kernels.offline` prints the table of all kernels and ends with 1 when one breaks a bound. Compiling
is in offline_sass.py, the table in offline_table.py. TRITON_INTERPRET must not be set: one process either compiles
kernels or interprets them.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Arch(NamedTuple):
    """What a multiprocessor has (CUDA programming guide, table of technical specifications per compute capability)."""

    gpus: str
    shared_kib: int
    """That one program may have; a multiprocessor has 1 KiB more, and each program takes 1 KiB beside its own."""
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
    """One specialization of a kernel, as a GPU would be given it, and the bounds that it must keep.

    Every module of Triton kernels has a tuple OFFLINE of them, one for each specialization that runs at full size.
    """

    name: str
    """As the table shows it: `dequantize bf16`, `linear M=16`. No other case has it."""
    kernel: Any
    """The @triton.jit function."""
    signature: Mapping[str, str]
    """Argument -> type, `*bf16:16` for a pointer or number that is divisible by 16, `i32:1` for a number that is 1;
    constants are left out."""
    constants: Mapping[str, Any]
    """The tl.constexpr arguments, and arguments that are None."""
    num_warps: int
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the launch: enable_fp_fusion=False, maxnreg=128. Without it, fusion is on, as in a launch."""
    archs: tuple[int, ...] = (80, 89, 90, 100)
    bounds: Mapping[str, Any] = field(default_factory=dict)
    """What must hold beside `no spills` and `shared memory fits`, which always must. A bound that is a number may be a
    mapping arch -> number too, and then holds on these alone.

    elements: weights or outputs that one program makes; no bound, but the table then shows instructions an element.
        In a kernel with a loop: the elements of one turn.
    max_instructions_per_element: SASS instructions of a thread for each of its elements, everything counted once.
    max_registers: of a thread.
    min_programs_per_sm: that fit a multiprocessor at once, by registers, shared memory and threads.
    loads_128, stores_128: True where some global loads (stores) must move 16 bytes a thread, or be made by TMA.
    hgmma: True where sm_90 must use its warpgroup matrix instructions.
    mma: True where every arch must use some matrix instruction.
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
    """One case compiled for one arch. With `error` the compiler refused it and the rest is 0."""

    name: str
    arch: int
    error: str = ""
    registers: int = 0
    """Of a thread."""
    spill_bytes: int = 0
    """Of a thread, stored and loaded, as ptxas counts them."""
    shared_bytes: int = 0
    shared_limit: int = 0
    programs_per_sm: int = 0
    threads: int = 0
    """Of a program."""
    instructions: int = 0
    """SASS instructions of the kernel, without its padding."""
    per_element: float | None = None
    """instructions * threads / bounds["elements"]."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Instructions by class: the keys of offline_sass.CLASSES."""
    wgmma_serialized: bool = False
    """Whether ptxas says that it serialized warpgroup matrix instructions (C7515): a hint, as it says so of plain bf16
    GEMMs too."""
    seconds: float = 0.0


def check(report: Report, case: Case) -> list[str]:
    """The bounds that are broken, one sentence each. ValueError for a bound that does not exist."""
    unknown = sorted(set(case.bounds) - set(BOUNDS))
    if unknown:
        raise ValueError(f"case {case.name!r} has unknown bounds {unknown}; known are {', '.join(BOUNDS)}")
    if report.error:
        return [f"does not compile: {report.error}"]
    broken = []
    if report.spill_bytes:
        broken.append(f"spills {report.spill_bytes} bytes a thread to local memory; it must spill none")
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
        raise ValueError(f"case {case.name!r} bounds instructions an element and does not say `elements`")
    if most is not None and report.per_element is not None and report.per_element > most:
        broken.append(f"runs {report.per_element:.2f} instructions an element; at most {most}")
    if registers is not None and report.registers > registers:
        broken.append(f"takes {report.registers} registers a thread; at most {registers}")
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
    """The OFFLINE cases of every distlora_kernels.*_triton module, in the modules' alphabetical order.

    AttributeError for a module without OFFLINE, which is () where all its functions are parts of other kernels;
    ValueError for two cases of one name.
    """
    package = importlib.import_module("distlora_kernels")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name.endswith("_triton"))
    cases = [case for name in names for case in importlib.import_module(f"distlora_kernels.{name}").OFFLINE]
    twice = sorted({case.name for case in cases if sum(other.name == case.name for other in cases) > 1})
    if twice:
        raise ValueError(f"several cases are named {twice}; the table could not tell them apart")
    return cases


if __name__ == "__main__":
    from distlora_kernels.offline_table import main

    sys.exit(main())
