"""Compiles one case of offline.py for one arch, and reads ptxas' log and the SASS. Needs triton and no driver.

The log is that of the very call of ptxas by which Triton makes the cubin, so which ptxas (`ptxas-blackwell` from sm_90
on in Triton 3.9, from sm_100 on in 3.6) and which options are Triton's business.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distlora_kernels.offline import ARCHS, Case, Report

REGISTERS = 65536
"""Of a multiprocessor, on each arch above; a warp's come in units of 8 a thread."""

LONGEST_ERROR = 400

CLASSES = {
    "LDG": r"LDG\.",
    "LDG.128": r"LDG\.E\S*\.(?:128|256)",
    "LDGSTS": r"LDGSTS\.",
    "LDGSTS.128": r"LDGSTS\.E\S*\.128",
    "STG": r"STG\.",
    "STG.128": r"STG\.E\S*\.(?:128|256)",
    "TMA": r"UTMA(?:LDG|STG)",
    "HGMMA": r"HGMMA\.",
    "HMMA": r"HMMA\.",
    "UTCMMA": r"UTC\w*MMA",
    "LDL": r"LDL\b",
    "STL": r"STL\b",
    "LDS": r"LDS\b",
    "STS": r"STS\b",
    "LDSM": r"LDSM\b",
    "SHFL": r"SHFL\b",
    "BAR": r"BAR\b",
}
"""Class -> what its SASS mnemonics look like."""

# `/*0a40*/  @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;`: address, predicate, mnemonic.
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def compile_case(case: Case, arch: int) -> Report:
    """The report of a case on an arch. A compiler's refusal is in its `error`; ValueError for a case whose arguments
    are not the kernel's.
    """
    source = _source(case)
    # Triton 3.10 turns fusion off where nobody says; a launch without the option has it on until then.
    options = {"enable_fp_fusion": True, **case.options, "num_warps": case.num_warps, "num_stages": case.num_stages}
    start = time.perf_counter()
    try:
        with _ptxas_log() as log:
            kernel: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # Any stage of the compiler has exceptions of its own; the bounds report them.
        return Report(name=case.name, arch=arch, error=_one_line(error))
    spills, registers = _SPILLS.search(log.getvalue()), _REGISTERS.search(log.getvalue())
    if spills is None or registers is None:
        raise RuntimeError(f"ptxas' log of {case.name} on sm_{arch} lacks spills or registers:\n{log.getvalue()}")
    mnemonics = _mnemonics(kernel.asm["cubin"])
    threads = 32 * case.num_warps
    shared, used = kernel.metadata.shared, int(registers[1])
    elements = case.bounds.get("elements")
    return Report(
        name=case.name,
        arch=arch,
        registers=used,
        spill_bytes=int(spills[1]) + int(spills[2]),
        shared_bytes=shared,
        shared_limit=ARCHS[arch].shared_kib * 1024,
        programs_per_sm=programs_per_sm(arch, registers=used, shared_bytes=shared, threads=threads),
        threads=threads,
        instructions=len(mnemonics),
        per_element=None if elements is None else len(mnemonics) * threads / elements,
        counts=_counts(mnemonics),
        wgmma_serialized="wgmma" in log.getvalue() and "serializ" in log.getvalue(),
        seconds=time.perf_counter() - start,
    )


def _counts(mnemonics: Sequence[str]) -> dict[str, int]:
    """How many instructions each class has."""
    words = Counter(mnemonics)
    return {
        name: sum(number for word, number in words.items() if re.match(form, word)) for name, form in CLASSES.items()
    }


def programs_per_sm(arch: int, *, registers: int, shared_bytes: int, threads: int) -> int:
    """Programs that a multiprocessor holds at once; 0 where the shared memory of one does not fit."""
    limits = ARCHS[arch]
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    by_shared = (limits.shared_kib + 1) * 1024 // (shared_bytes + 1024)
    return min(by_registers, by_shared, limits.threads // threads, limits.programs)


def _one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]} ..."


def _source(case: Case) -> ASTSource:
    kernel = case.kernel
    if not isinstance(kernel, triton.runtime.JITFunction):
        raise ValueError(f"case {case.name!r}: {kernel!r} is no @triton.jit function; is TRITON_INTERPRET set?")
    given, wanted = {*case.signature, *case.constants}, set(kernel.arg_names)
    if given != wanted or set(case.signature) & set(case.constants):
        raise ValueError(
            f"case {case.name!r}: arguments of the kernel that it lacks: {sorted(wanted - given)}; that the kernel "
            f"does not have: {sorted(given - wanted)}; both typed and constant: "
            f"{sorted(set(case.signature) & set(case.constants))}"
        )
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        kind, _, special = case.signature.get(name, "constexpr").partition(":")
        if special not in ("", "1", "16"):
            raise ValueError(f"case {case.name!r}: {name} is {kind}:{special}; only :16 and :1 mean something")
        types[name] = "constexpr" if special == "1" else kind
        if types[name] == "constexpr":
            constants[(index,)] = 1 if special == "1" else case.constants[name]
        elif special == "16":
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)


@contextlib.contextmanager
def _ptxas_log() -> Iterator[io.StringIO]:
    """Collects what Triton prints while it compiles, which is made to be ptxas' log."""
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # What comes from a cache has no log.
        yield log


def _mnemonics(cubin: bytes) -> list[str]:
    """The SASS instructions of a cubin in order, without the padding after the last one."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory(prefix="distlora-offline-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass = subprocess.run([str(tool), "-c", "-ndf", str(path)], capture_output=True, text=True, check=True).stdout
    found = [match[1] for match in map(_INSTRUCTION.search, sass.splitlines()) if match is not None]
    return [word for word in found if word != "NOP"]
