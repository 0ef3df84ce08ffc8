"""Compiles all cases in a few processes and prints the table of them: `python -m distlora_kernels.offline`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import triton

from distlora_kernels.offline import ARCHS, Case, Report, all_cases, check
from distlora_kernels.offline_sass import compile_case

DONE, BROKEN, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

LEGEND = """\
regs      registers of a thread
spill     bytes of a thread that found no register: always a fault
shared    KiB of shared memory of a program
progs/SM  programs that a multiprocessor holds at once
instr     SASS instructions of the kernel
/elem     of these a thread runs for each of its elements
ld, st    global loads and stores of 16 bytes a thread, of all
matrix    matrix instructions: HMMA, HGMMA (sm_90), UTCMMA (sm_100); `serialized` is a hint of ptxas, no fault"""

_cases: list[Case] = []
"""In a worker process: the cases, which hold functions and so cannot be sent."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, 1 when a bound is broken, 2 for arguments that mean nothing, 130 after Ctrl-C."""
    options = _parse(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print(
            "error: TRITON_INTERPRET is set, so that kernels are interpreted; unset it to compile them", file=sys.stderr
        )
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
    """One report a case and arch (those of the case that are among `archs`), in order. In a cache of its own, so that
    nothing depends on what was compiled before. `progress` is called with (done, all).
    """
    jobs = [(index, arch) for index, case in enumerate(cases) for arch in case.archs if arch in archs]
    done: dict[tuple[int, int], Report] = {}
    others = set(multiprocessing.active_children())
    # Forked, because a case holds functions, and because importing torch and triton again takes seconds.
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
        except BaseException:  # Ctrl-C too, after which nobody wants to wait for the kernels that are begun.
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise
    return [done[job] for job in jobs]


def table(reports: Sequence[Report]) -> str:
    """The reports under a heading and above a legend, rows of one kernel together."""
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
    cards = "; ".join(f"sm_{arch} {ARCHS[arch].gpus}" for arch in sorted({report.arch for report in reports}))
    title = f"The kernels as Triton {triton.__version__} compiles them. Nothing ran, and no GPU is needed."
    return "\n".join([title, "", *lines, "", LEGEND, f"GPU       {cards}"])


def verdict(reports: Sequence[Report], broken: dict[tuple[str, int], list[str]]) -> str:
    """What did not hold, a line each, or that all did."""
    lines = [f"BROKEN  {name} on sm_{arch}: {text}" for (name, arch), texts in broken.items() for text in texts]
    if not lines:
        return f"All {len(reports)} keep their bounds: nothing spills, shared memory fits, and what each kernel states."
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
    parser.add_argument("--json", action="store_true", help="every figure and every broken bound, as one JSON object")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=sorted(ARCHS), help="compile for these alone: 90 is an H100"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="kernels with TEXT in their name")
    return parser.parse_args(arguments)


def _show_progress(done: int, jobs: int) -> None:
    """On a terminal a line that counts; elsewhere one line at the first kernel."""
    if sys.stderr.isatty():
        print(f"\rcompiled {done} of {jobs}", end="\n" if done == jobs else "", file=sys.stderr, flush=True)
    elif done == 1:
        print(
            f"compiling {jobs} kernels, each counted once for each GPU; about 0.7 s of a core each",
            file=sys.stderr,
            flush=True,
        )


def _set_cases(cases: list[Case]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer.
    tempfile.tempdir = os.environ["TRITON_CACHE_DIR"]  # Triton's and our files are then gone however this ends.
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
