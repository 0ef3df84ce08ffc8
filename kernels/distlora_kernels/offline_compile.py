"""Compile the offline cases in parallel, read ptxas' log and the SASS, and print the table. Needs triton, no driver.

The log comes from the call of ptxas by which Triton makes the cubin, so Triton chooses the ptxas (`ptxas-blackwell`
from sm_90 on in Triton 3.9, from sm_100 on in 3.6) and its options.
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
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distlora_kernels.offline import ARCHS, Case, Report, all_cases, check

DONE, BROKEN, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

LEGEND = """\
regs      registers per thread
spill     spilled bytes per thread: always a fault
shared    KiB of shared memory per program
progs/SM  programs that a multiprocessor holds at once
instr     SASS instructions of the kernel
/elem     instructions of a thread per element
ld, st    global loads and stores of 16 bytes per thread, of all
matrix    matrix instructions: HMMA, HGMMA (sm_90), UTCMMA (sm_100); `serialized` is a hint of ptxas, not a fault"""

_cases: list[Case] = []
"""The cases in a worker process; they hold functions and cannot be pickled."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0; 1 if a bound is broken; 2 for wrong arguments; 130 after Ctrl-C."""
    options = _parse(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("error: TRITON_INTERPRET is set, so kernels are interpreted; unset it to compile them", file=sys.stderr)
        return BAD_INPUT
    archs = options.arch or sorted(ARCHS)
    cases = [case for case in all_cases() if options.only in case.name and set(archs) & set(case.archs)]
    if not cases:
        known = "\n".join(f"  {case.name} ({', '.join(map(str, case.archs))})" for case in all_cases())
        chosen = f"{options.only!r} in its name and is for sm_{' or sm_'.join(map(str, archs))}"
        print(f"error: no kernel has {chosen}; there are:\n{known}", file=sys.stderr)
        return BAD_INPUT
    try:
        reports = compile_all(cases, archs, progress=_show_progress)
    except KeyboardInterrupt:
        return INTERRUPTED
    by_name = {case.name: case for case in cases}
    broken = {(report.name, report.arch): check(report, by_name[report.name]) for report in reports}
    if options.json:
        rows = [dataclasses.asdict(report) | {"broken": broken[report.name, report.arch]} for report in reports]
        print(json.dumps({"triton": triton.__version__, "reports": rows}, indent=1))
    else:
        print(table(reports))
        print()
        print(verdict(reports, broken))
    return BROKEN if any(broken.values()) else DONE


def compile_all(
    cases: Sequence[Case], archs: Sequence[int] = tuple(ARCHS), *, progress: Callable[[int, int], None] | None = None
) -> list[Report]:
    """Return one report per case and arch, in order, compiled with a fresh cache.

    Args:
        cases: The cases to compile.
        archs: Archs to compile for, where the case has them.
        progress: Called with (done, all).
    """
    jobs = [(index, arch) for index, case in enumerate(cases) for arch in case.archs if arch in archs]
    done: dict[tuple[int, int], Report] = {}
    others = set(multiprocessing.active_children())
    # Forked, because a case holds functions and importing torch and triton again takes seconds.
    pool = ProcessPoolExecutor(
        min(8, len(os.sched_getaffinity(0))), multiprocessing.get_context("fork"), _set_cases, (list(cases),)
    )
    with _fresh_cache(), pool:
        futures = {pool.submit(_compile, *job): job for job in jobs}
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                if progress is not None:
                    progress(len(done), len(jobs))
        except BaseException:  # On Ctrl-C too, do not wait for running compilations.
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise
    return [done[job] for job in jobs]


def table(reports: Sequence[Report]) -> str:
    """Return the table of the reports with a heading and a legend."""
    heading = ("kernel", "GPU", "regs", "spill", "shared", "progs/SM", "instr", "/elem", "ld", "st", "matrix")
    rows: list[tuple[str, ...]] = [heading]
    previous = ""
    for report in reports:
        name = "" if report.name == previous else report.name
        rows.append((name, f"sm_{report.arch}", *_figures(report)))
        previous = report.name
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    left = (0, 1, len(heading) - 1)
    lines = [
        "  ".join(
            word.ljust(width) if column in left else word.rjust(width)
            for column, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    gpus = "; ".join(f"sm_{arch} {ARCHS[arch].gpus}" for arch in sorted({report.arch for report in reports}))
    title = f"The kernels as Triton {triton.__version__} compiles them. Nothing ran; no GPU is needed."
    return "\n".join([title, "", *lines, "", LEGEND, f"GPU       {gpus}"])


def verdict(reports: Sequence[Report], broken: dict[tuple[str, int], list[str]]) -> str:
    """Return the broken bounds, one per line, or that all hold."""
    lines = [f"BROKEN  {name} on sm_{arch}: {text}" for (name, arch), texts in broken.items() for text in texts]
    if not lines:
        return f"All {len(reports)} keep their bounds: no spills, shared memory fits, and each kernel's bounds hold."
    return "\n".join([*lines, "", f"{sum(map(bool, broken.values()))} of {len(reports)} break a bound."])


def _figures(report: Report) -> tuple[str, ...]:
    if report.error:
        return (*[""] * 8, "does not compile")
    counts = report.counts
    matrix = [f"{counts[name]} {name}" for name in ("HGMMA", "HMMA", "UTCMMA") if counts[name]]
    return (
        str(report.registers),
        str(report.spill_bytes),
        f"{report.shared_bytes / 1024:.1f}",
        str(report.programs_per_sm),
        str(report.instructions),
        "" if report.per_element is None else f"{report.per_element:.1f}",
        f"{counts['LDG.128'] + counts['LDGSTS.128']}/{counts['LDG'] + counts['LDGSTS']}",
        f"{counts['STG.128']}/{counts['STG']}",
        " ".join([*matrix, *(["serialized"] if report.wgmma_serialized else [])]),
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m distlora_kernels.offline", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print every figure and broken bound as one JSON object")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=sorted(ARCHS), help="compile for these only: 90 is an H100"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="kernels with TEXT in their name")
    return parser.parse_args(arguments)


def _show_progress(done: int, jobs: int) -> None:
    """Show a counter on a terminal, elsewhere one line at the first kernel."""
    if sys.stderr.isatty():
        print(f"\rcompiled {done} of {jobs}", end="\n" if done == jobs else "", file=sys.stderr, flush=True)
    elif done == 1:
        print(
            f"compiling {jobs} kernels (each counted once per GPU), about 0.7 s of a core each",
            file=sys.stderr,
            flush=True,
        )


def _set_cases(cases: list[Case]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent handles Ctrl-C.
    tempfile.tempdir = os.environ["TRITON_CACHE_DIR"]  # So that all files are removed however this ends.
    _cases[:] = cases


def _compile(index: int, arch: int) -> Report:
    return compile_case(_cases[index], arch)


@contextlib.contextmanager
def _fresh_cache() -> Iterator[None]:
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="distlora-triton-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before


REGISTERS = 65536
"""Registers of a multiprocessor, on each arch; allocated in units of 8 per thread."""

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
"""Pattern of SASS mnemonics by class."""

# `/*0a40*/  @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;`: address, predicate, mnemonic.
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def compile_case(case: Case, arch: int) -> Report:
    """Compile a case for an arch. A compiler error is in the report; ValueError if arguments do not fit the kernel."""
    source = _source(case)
    # Triton 3.10 turns fusion off by default; a launch without the option has it on until then.
    options = {"enable_fp_fusion": True, **case.options, "num_warps": case.num_warps, "num_stages": case.num_stages}
    start = time.perf_counter()
    try:
        with _ptxas_log() as log:
            kernel: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # Each compiler stage has its exceptions; the bounds report them.
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
    """Count the instructions of each class."""
    words = Counter(mnemonics)
    return {
        name: sum(number for word, number in words.items() if re.match(form, word)) for name, form in CLASSES.items()
    }


def programs_per_sm(arch: int, *, registers: int, shared_bytes: int, threads: int) -> int:
    """Return how many programs a multiprocessor holds at once; 0 if the shared memory of one does not fit."""
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
        raise ValueError(f"case {case.name!r}: {kernel!r} is not a @triton.jit function; is TRITON_INTERPRET set?")
    given, wanted = {*case.signature, *case.constants}, set(kernel.arg_names)
    if given != wanted or set(case.signature) & set(case.constants):
        raise ValueError(
            f"case {case.name!r}: missing arguments: {sorted(wanted - given)}; unknown arguments: "
            f"{sorted(given - wanted)}; both typed and constant: "
            f"{sorted(set(case.signature) & set(case.constants))}"
        )
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        kind, _, special = case.signature.get(name, "constexpr").partition(":")
        if special not in ("", "1", "16"):
            raise ValueError(f"case {case.name!r}: {name} is {kind}:{special}; only :16 and :1 are valid")
        types[name] = "constexpr" if special == "1" else kind
        if types[name] == "constexpr":
            constants[(index,)] = 1 if special == "1" else case.constants[name]
        elif special == "16":
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)


@contextlib.contextmanager
def _ptxas_log() -> Iterator[io.StringIO]:
    """Collect what Triton prints while it compiles, which includes ptxas' log."""
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # A cached kernel has no log.
        yield log


def _mnemonics(cubin: bytes) -> list[str]:
    """Return the SASS instructions of a cubin in order, without padding."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory(prefix="distlora-offline-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass = subprocess.run([str(tool), "-c", "-ndf", str(path)], capture_output=True, text=True, check=True).stdout
    instructions = [match[1] for match in map(_INSTRUCTION.search, sass.splitlines()) if match is not None]
    return [word for word in instructions if word != "NOP"]
