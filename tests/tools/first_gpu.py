"""The first half hour on a GPU, in calls of at most ten minutes.

    make gpu-wheels                       # on a machine with a network: the packages that it lacks, into .gpu
    python3 tests/tools/first_gpu.py      # again until it ends with status 0 or 1

It answers in this order: does training run, with which losses, speed and memory; are the kernels right; how do the
main settings compare, and other libraries; then all the rest. One command runs one subject:

    python3 tests/tools/first_gpu.py check      # kernels: sanitizers, tests, benchmark
    python3 tests/tools/first_gpu.py train      # a Llama 3 8B with random weights: losses, speed, memory
    python3 tests/tools/first_gpu.py compare    # a step beside PEFT + bitsandbytes and Trainer

The steps that `train` measures are the trainer's own. A dry run uses tiny shapes on the CPU, and traces the settings
of `train` at the sizes of Llama 3 8B on the pretended GPU (tests/pretend_cuda/).

The machine needs the packages of gpu_packages.NEEDED, some of which .gpu has, but not distlora. A command consists of
parts. After each one its figures are written to COMMAND.json and COMMAND.md in --out ($OUT by default); COMMAND is
`all` by default. A command ends by itself before its limit; the same command then goes on with the parts that are left:
first those never tried, then those whose time was up, then those that failed. On another machine it reads the parts
that are done from COMMAND.json in .gpu, if it was copied there, and writes the checkpoints again that the others need.

Exit status: 0 all parts are done or skipped; 1 a part failed; 2 a package is missing; 75 parts are left.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_packages import ROOT, install, work_folder

Figures = dict[str, Any]
DONE, FAILED, BAD_INPUT, LEFT = 0, 1, 2, 75
TURNS = ("left", "time is up", "skipped", "failed")
"""Statuses of parts that are not done, in the order in which a call tries them."""
SPACE = 40e9
"""Bytes that `train` may write: checkpoints of 16 and 6 GB, their quantized weights, and runs."""


class PartFailedError(Exception):
    """A command of a part failed; its output is in the log."""


class TimeUpError(Exception):
    """The time of this call, or of a part, is up."""


class SkippedError(Exception):
    """A part cannot run on this machine."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One call of one command."""

    command: str
    out: Path
    work: Path
    dry: bool
    until: float
    """Moment at which this call ends, by time.monotonic."""
    environment: Mapping[str, str]

    @property
    def log(self) -> Path:
        """Output of all subprocesses."""
        return self.out / f"{self.command}.log"

    def run(self, *words: object, seconds: float | None = None, good: Sequence[int] = (0,), **variables: str) -> str:
        """Run `python words` and return its stdout. Raises PartFailedError, or TimeUpError at the end of the time."""
        return self.start(sys.executable, *words, seconds=seconds, good=good, **variables)

    def start(self, *words: object, seconds: float | None = None, good: Sequence[int] = (0,), **variables: str) -> str:
        """Run a program like `run`."""
        command = [str(word) for word in words]
        with self.log.open("a") as log:
            print(f"\n$ {' '.join(command)}", file=log, flush=True)
            process = subprocess.Popen(
                command,
                env={**self.environment, **variables},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
            left = self.until - time.monotonic()
            try:
                output, _ = process.communicate(timeout=max(1.0, min(left, seconds or left)))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                log.write(process.communicate()[0])
                raise TimeUpError(
                    f"stopped after {min(left, seconds or left):.0f} s: {' '.join(command)[:90]}"
                ) from None
            log.write(output)
        if process.returncode not in good:
            last = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()][-6:]
            raise PartFailedError(f"exit code {process.returncode}: " + " | ".join(last)[-800:])
        return output

    def distlora(self, *words: object, **options: Any) -> str:
        """Run a distlora command."""
        return self.run("-m", "distlora_launcher.cli.main", *words, **options)

    def worker(self, name: str, **values: Any) -> Figures:
        """Run a function of first_gpu_workers.py in a process of its own and return its figures."""
        script = ROOT / "tests" / "tools" / "first_gpu_workers.py"
        figures: Figures = json.loads(self.run(script, name, json.dumps(values)).splitlines()[-1])
        return figures


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of a command."""

    name: str
    run: Callable[[Session], Figures]
    """Returns figures; "markdown" is text for the report, "row" a row of a table of all such parts."""
    least: float = 20.0
    """Seconds below which it is left for the next call."""


def lines_of(run: Path) -> list[Figures]:
    """Return the lines of a run's metrics, one per step; a running one may have written half of the last."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run: Path) -> list[float]:
    """Return the losses of a run by step; a repeated step counts once."""
    return list({line["step"]: line["loss"] for line in lines_of(run) if "loss" in line}.values())


def speed(run: Path) -> Figures:
    """Return a run's tokens per second, MFU, and memory beside the plan, by category."""
    lines = lines_of(run)
    figures: Figures = {}
    for name in ("tokens_per_second", "mfu"):
        values = [line[name] for line in lines if name in line][1:] or [line[name] for line in lines if name in line]
        figures[name] = statistics.median(values) if values else None
    measured = next((line for line in reversed(lines) if "memory/peak" in line), {})
    peaks = [line["peak_memory_bytes"] for line in lines if "peak_memory_bytes" in line]
    figures["peak_bytes"] = max(peaks, default=None)
    figures["memory"] = {name: value for name, value in measured.items() if name.startswith("memory")}
    return figures


def memory_table(memory: Mapping[str, int]) -> str:
    """Return the memory of a step by category beside the plan."""
    rows = [
        (name, f"memory/{name}", f"memory_planned/{name}")
        for name in dict.fromkeys(key.partition("/")[2] for key in memory)
        if name not in ("peak", "planned")
    ]
    rows.append(("peak", "memory/peak", "memory/planned"))
    lines = [f"| {name} | {memory.get(a, 0) / 1e9:.3f} | {memory.get(b, 0) / 1e9:.3f} |" for name, a, b in rows]
    return "\n".join(["| category | measured, GB | planned, GB |", "|--|--|--|", *lines])


# check ----------------------------------------------------------------------------------------------------------------


def versions(session: Session) -> Figures:
    """Return the versions and the GPU. Raises PartFailedError without a GPU."""
    figures = session.worker("versions")
    if not session.dry and figures["gpu"] is None:
        raise PartFailedError("torch sees no GPU")
    return figures


def tests(session: Session, *, marked: bool) -> Figures:
    """Run the tests that launch Triton kernels, natively on a GPU in ten processes; or those marked `gpu`.

    Interpreting all cells of their tables takes too long for `make test`, but not running them on a GPU.
    """
    report = session.work / "tests.xml"
    words: list[object] = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    if marked:
        words += ["-m", "gpu", "tests/kernels/test_gpu.py" if session.dry else "tests"]
    else:
        files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "triton_device" in path.read_text())
        words += ["-m", "not slow"]
        # One process would compile for more than ten minutes.
        words += ["tests/kernels/test_scratch.py"] if session.dry else ["-n", 10, "--dist", "load", *files]
    session.run("-m", "pytest", *words, good=(0, 1, 5))
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases if {each.tag for each in case} & FAULTS]
    skipped = sum(case.find("skipped") is not None for case in cases)
    figures = {"passed": len(cases) - len(failed) - skipped, "failed": len(failed), "skipped": skipped}
    if failed:
        raise PartFailedError(f"{figures}: {', '.join(failed[:20])}")
    return figures


FAULTS = {"failure", "error"}
"""Elements of a failed test in JUnit's format."""


def sanitizer(session: Session, tool: str, section: str) -> Figures:
    """Run our kernels of a section of the benchmark under compute-sanitizer, the libraries' beside it."""
    if session.dry:
        return bench_kernels(session, section, "192x128", "16")
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        raise SkippedError("compute-sanitizer is not on this machine")
    options: list[object] = ["--tool", tool, "--error-exitcode", 9, "--target-processes", "application-only"]
    options += ["--report-api-errors", "no"]  # torch asks for functions that a driver may lack.
    for name in kernel_names():
        options += ["--kernel-name", f"kns={name}"]
    bench = (sys.executable, KERNELS_SCRIPT, section, "--check")
    shapes = ("--shapes", "512x1024+256x1024,256x512", "--m", "16,64")
    session.start(program, *options, *bench, *shapes, seconds=90, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return {"markdown": "No fault."}


def kernel_names() -> list[str]:
    """Return the names of our Triton kernels."""
    sources = sorted((ROOT / "kernels" / "distlora_kernels").rglob("*_triton.py"))
    launched = re.compile(r"^@triton\.jit(?:\([^)]*\))?\ndef (\w+_kernel)\(", re.MULTILINE)
    return [name for source in sources for name in launched.findall(source.read_text())]


KERNELS_SCRIPT = ROOT / "benchmarks" / "gpu_kernels.py"


def bench_kernels(session: Session, section: str, shapes: str, counts: str) -> Figures:
    """Run a section of benchmarks/gpu_kernels.py; in a dry run check it in Triton's interpreter."""
    if not session.dry:
        return {"markdown": session.run(KERNELS_SCRIPT, section, "--shapes", shapes, "--m", counts)}
    run = "import sys; from support import triton_interpreter; import gpu_kernels; sys.exit(gpu_kernels.main())"
    words = (section, "--shapes", "192x128", "--m", "16", "--device", "cpu")
    return {"markdown": session.run("-c", run, *words, OMP_NUM_THREADS="1")}


def check_parts(dry: bool) -> Iterator[Part]:
    """Yield the parts of `check`."""
    sanitizers = [
        Part(name=f"{tool}, {section}", run=partial(sanitizer, tool=tool, section=section))
        for section in ("linear", "elementwise", "skinny", "dequantize")[: 2 if dry else 4]
        for tool in ("memcheck", "racecheck")[: 1 if dry else 2]
    ]
    yield Part(name="versions", run=versions)
    # First the kernel that nothing has executed: the register-operand product of fused_triton.py.
    yield from sanitizers[:2]
    yield Part(name="kernel tests", run=partial(tests, marked=False), least=60)
    yield Part(name="tests marked gpu", run=partial(tests, marked=True), least=60)
    for model in ("llama-8b", "llama-70b")[: 1 if dry else 2]:
        for section in ("dequantize", "formats", "linear", "skinny", "elementwise")[: 2 if dry else 5]:
            counts, least = ("8192", 120) if section == "formats" else ("16,256,8192", 30)
            run = partial(bench_kernels, section=section, shapes=model, counts=counts)
            yield Part(name=f"bench {section}, {model}", run=run, least=least)
    yield from sanitizers[2:]


# train ----------------------------------------------------------------------------------------------------------------

LAYERS, FEW_LAYERS = 32, 8
LONG, SHORT = 8192, 2048
FIRST_STEPS = {False: 12, True: 30}
"""Steps of the first run, by whether it is a dry run, whose steps are short."""


def lengths(session: Session) -> tuple[int, int]:
    """Return the tokens of a long and of a short sequence."""
    return (64, 32) if session.dry else (LONG, SHORT)


def layers(session: Session, count: int) -> int:
    """Return the decoder layers of a model; a dry run has two instead of eight, and three instead of 32."""
    return {LAYERS: 3, FEW_LAYERS: 2}[count] if session.dry else count


def checkpoint(session: Session, count: int) -> Path:
    """Return the folder of a random checkpoint of Llama 3 8B's shapes and text; write it if it is missing."""
    folder = session.work / f"llama-{count}"
    if not folder.exists():
        session.worker("checkpoint", folder=str(folder), dry=session.dry, layers=layers(session, count))
    return folder


def run_dir(session: Session, name: str) -> Path:
    """Return the empty folder of a run."""
    run = session.work / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    return run


def settings(session: Session, count: int, run: Path, *, steps: int, length: int, **others: object) -> list[str]:
    """Return the settings of a run: all-linear, r = 16, one sequence per step."""
    model = checkpoint(session, count)
    return [
        "recipe=qlora",
        f"model.path={model}",
        f"data.path={model / 'text.jsonl'}",
        f"data.sequence_length={length}",
        "data.eval_fraction=0",
        "train.global_batch=1",
        "train.micro_batch=1",
        f"train.max_steps={steps}",
        "tracker=none",
        f"run_dir={run}",
        *(f"{name.replace('__', '.')}={value}" for name, value in others.items()),
    ]


def first_run(session: Session) -> Figures:
    """Train a few steps on the checkpoint, which is quantized and cached."""
    run, steps = run_dir(session, "first"), FIRST_STEPS[session.dry]
    session.distlora("train", *settings(session, LAYERS, run, steps=steps, length=lengths(session)[0]))
    found = losses(run)
    if len(found) != steps:
        raise PartFailedError(f"{len(found)} of {steps} losses were logged")
    figures = speed(run)
    return {"losses": found, **figures, "markdown": memory_table(figures["memory"])}


def resumed_run(session: Session) -> Figures:
    """Train again from the quantized cache, stop with a save on the way, resume; the losses are the first run's."""
    run, expected = run_dir(session, "resumed"), losses(session.work / "runs" / "first")
    if (
        len(expected) != FIRST_STEPS[session.dry]
    ):  # It was made on another machine, whose losses may differ, or not at all.
        expected = first_run(session)["losses"]
    words = settings(session, LAYERS, run, steps=len(expected), length=lengths(session)[0])
    process = subprocess.Popen(
        [sys.executable, "-m", "distlora_launcher.cli.main", "train", *words],
        env={**session.environment},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=session.log.open("a"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        while process.poll() is None and len(losses(run)) < 3:
            if time.monotonic() > session.until:
                raise TimeUpError("no third step in time")
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=max(1.0, session.until - time.monotonic()))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    stopped = len(losses(run))
    if code != 75 or not 0 < stopped < len(expected):
        raise PartFailedError(f"the run ended with exit code {code} after {stopped} steps, not with a save on the way")
    session.distlora("resume", run)
    found = losses(run)
    if found != expected:
        wrong = [index for index, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]]
        raise PartFailedError(f"losses differ from the first run's, first at step {wrong[:1]}: {found} {expected}")
    return {
        "stopped_after": stopped,
        "markdown": f"Stopped after step {stopped}, resumed: all losses equal bit for bit.",
    }


def matrix_run(session: Session, *, checkpointing: str, fused: str, deterministic: str, long: bool) -> Figures:
    """Train five steps on eight layers. Returns a row of the table."""
    length = lengths(session)[not long]
    run = run_dir(session, "matrix")
    chosen = {
        "train__checkpointing": checkpointing,
        "train__fused_kernels": fused,
        "train__deterministic_attention": deterministic,
    }
    session.distlora("train", *settings(session, FEW_LAYERS, run, steps=5, length=length, **chosen))
    figures = speed(run)
    measured, planned = (figures["memory"].get(f"memory/{name}", 0) / 1e9 for name in ("peak", "planned"))
    row = {
        "checkpointing": checkpointing,
        "fused kernels": fused,
        "deterministic": deterministic,
        "tokens": length,
        "tokens/s": f"{figures['tokens_per_second'] or 0:,.0f}",
        "MFU": f"{figures['mfu']:.1%}" if figures["mfu"] else "",
        "peak / planned, GB": f"{measured:.2f} / {planned:.2f}",
    }
    return {**figures, "row": row}


def traced_step(session: Session, **cell: object) -> Figures:
    """Trace the trainer's step on the pretended GPU, with eight layers of 8B's sizes. Returns a row of the table."""
    figures = session.worker("traced_step", folder=str(session.work), layers=FEW_LAYERS, **cell)
    if "missing" in figures:
        raise SkippedError(figures["missing"])
    return figures


def train_parts(dry: bool) -> Iterator[Part]:
    """Yield the parts of `train`."""
    yield Part(name="first run", run=first_run, least=150)
    yield Part(name="save, resume from the cache", run=resumed_run, least=90)
    cells = [
        {"checkpointing": checkpointing, "fused": fused, "deterministic": deterministic, "long": long}
        for fused in ("own", "none")
        for deterministic in ("true", "false")
        for long in (True, False)
        for checkpointing in ("block", "none")
    ]
    names = [
        f"8 layers, {'long' if cell['long'] else 'short'}, checkpointing {cell['checkpointing']}"
        f", fused {cell['fused']}, deterministic {cell['deterministic']}"
        for cell in cells
    ]
    for name, cell in list(zip(names, cells, strict=True))[: 1 if dry else None]:
        yield Part(name=name, run=partial(matrix_run, **cell), least=40)
    if dry:
        # The cells that a GPU measures first. Without fused kernels the plan is up to 11 % below the trace.
        for name, cell in list(zip(names, cells, strict=True))[:4]:
            tokens = LONG if cell["long"] else SHORT
            chosen = {key: cell[key] for key in ("checkpointing", "fused", "deterministic")}
            yield Part(name=f"traced: {name}", run=partial(traced_step, tokens=tokens, **chosen))


# compare --------------------------------------------------------------------------------------------------------------


def bench_step(session: Session, size: str, tokens: int) -> Figures:
    """Run benchmarks/step.py."""
    words: list[object] = ["--ways", "ours,peft-documented,peft-bf16", "--ranks", 1, "--checkpointing", "block"]
    words += ["--sizes", "8M" if session.dry else size, "--tokens", 64 if session.dry else tokens, "--rows", 1]
    script = ROOT / "benchmarks" / "step.py"
    return {"markdown": session.run(script, *words, "--rounds", 1 if session.dry else 3)}


def compare_parts(dry: bool) -> Iterator[Part]:
    """Yield the parts of `compare`."""
    yield Part(name="step, 8B/4", run=partial(bench_step, size="8B/4", tokens=8192), least=120)
    if not dry:
        yield Part(name="step, 70B/4", run=partial(bench_step, size="70B/4", tokens=2048), least=120)
    for model in ("llama-8b", "llama-70b")[: 1 if dry else 2]:
        run = partial(bench_kernels, section="linear", shapes=model, counts="64,128,256,512,1024")
        yield Part(name=f"fused or scratch, {model}", run=run, least=30)


# The commands ---------------------------------------------------------------------------------------------------------

FIRST = (
    "versions",
    "first run",
    "memcheck, linear",
    "racecheck, linear",
    "8 layers, long, checkpointing block, fused own, deterministic true",
    "8 layers, long, checkpointing none, fused own, deterministic true",
    "step, 8B/4",
    "kernel tests",
    "tests marked gpu",
    "save, resume from the cache",
    "bench linear, llama-8b",
)
"""Parts of all commands, the most important first. The others follow in their own order."""


def all_parts(dry: bool) -> Iterator[Part]:
    """Yield the parts of all commands, those of FIRST before the others."""
    parts = [part for command in (check_parts, train_parts, compare_parts) for part in command(dry)]
    yield from sorted(parts, key=lambda part: FIRST.index(part.name) if part.name in FIRST else len(FIRST))


COMMANDS = {"all": all_parts, "check": check_parts, "train": train_parts, "compare": compare_parts}


def run_parts(session: Session, parts: Sequence[Part], records: dict[str, Figures]) -> int:
    """Run the parts that are not done, and write the report after each. Returns the exit status."""

    def status(part: Part) -> str:
        return str(records.get(part.name, {}).get("status", "left"))

    def turn(part: Part) -> tuple[int, int]:
        return TURNS.index(status(part)), records.get(part.name, {}).get("tries", 0)

    places = {part.name: f"{session.command} {number}/{len(parts)} {part.name}" for number, part in enumerate(parts, 1)}
    for part in parts:
        if status(part) == "done":
            print(f"{places[part.name]}: done before", flush=True)
    # A part that never ends in its time must not keep the others from theirs.
    for part in sorted((part for part in parts if status(part) != "done"), key=turn):
        place, tries = places[part.name], records.get(part.name, {}).get("tries", 0)
        left = session.until - time.monotonic()
        if left < (0 if session.dry else part.least):
            print(f"{place}: left for the next call ({left:.0f} s are left)", flush=True)
            continue
        began = time.monotonic()
        try:
            record = {"status": "done", **part.run(session)}
        except SkippedError as error:
            record = {"status": "skipped", "error": str(error)}
        except (TimeUpError, subprocess.TimeoutExpired) as error:
            record = {"status": "time is up", "error": str(error)}
        except Exception as error:  # Any fault is recorded; the next part goes on.
            with session.log.open("a") as log:
                traceback.print_exc(file=log)
            record = {"status": "failed", "error": str(error) or type(error).__name__}
        record |= {"seconds": round(time.monotonic() - began, 1), "tries": tries + 1}
        records[part.name] = record
        write(session, parts, records)
        said = record.get("error", "").replace("\n", " ")
        print(f"{place}: {record['status']} in {record['seconds']:.0f} s {said[:300]}".rstrip(), flush=True)
    counts = Counter(map(status, parts))
    figures = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{session.command}: {figures} of {len(parts)} parts; {session.out}/{session.command}.md", flush=True)
    return FAILED if counts["failed"] else LEFT if counts["left"] or counts["time is up"] else DONE


def write(session: Session, parts: Sequence[Part], records: Mapping[str, Figures]) -> None:
    """Write COMMAND.json and COMMAND.md, and a copy of the first for the next call."""
    text = json.dumps(records, indent=1)
    for place in (session.out, session.work):
        (place / f"{session.command}.json").write_text(text)
    lines, header = [f"# {session.command}"], None
    for part in parts:
        record = records.get(part.name)
        if record is None:
            continue
        if (row := record.get("row")) is not None:
            if header != row.keys():
                lines += ["", f"| {' | '.join(row)} |", "|--" * len(row) + "|"]
            lines.append(f"| {' | '.join(map(str, row.values()))} |")
            header = row.keys()
            continue
        header = None
        shown = {
            key: value for key, value in record.items() if isinstance(value, int | float | str) and key != "markdown"
        }
        figures = ", ".join(f"{key} {value}" for key, value in shown.items() if key not in ("status", "error", "tries"))
        lines += ["", f"## {part.name}: {record['status']}", "", figures]
        lines += ["", record.get("markdown") or record.get("error", "")]
    (session.out / f"{session.command}.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    """Run a command. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS, nargs="?", default="all", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder of the reports")
    parser.add_argument("--work", type=Path, help="checkpoints, caches, runs (in /dev/shm, or a temporary folder)")
    parser.add_argument("--packages", type=Path, default=ROOT / ".gpu", help="folder of carried wheels (%(default)s)")
    parser.add_argument("--seconds", type=float, default=510.0, help="time of this call (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, kernels in Triton's interpreter")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    name = "distlora-first-gpu-dry" if options.dry else "distlora-first-gpu"
    work = (options.work or work_folder(name, least=1e9 if options.dry else SPACE)).resolve()
    out = work / "out" if options.out is None else Path(options.out).resolve()
    for place in (work, out):
        place.mkdir(parents=True, exist_ok=True)
    # Libraries cannot be loaded from /dev/shm where files there may not be executed.
    site = (options.work or Path(tempfile.gettempdir(), name)).resolve() / "site"
    if (fault := install(options.packages, site)) is not None:
        print(f"error: {fault}", file=sys.stderr)
        return BAD_INPUT
    paths = [site, ROOT / "tests", ROOT / "benchmarks", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONSAFEPATH": "1",
        "DISTLORA_CACHE": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        # Device files may be those of GPUs that this machine cannot use.
        "CUDA_VISIBLE_DEVICES": "" if options.dry else os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
    }
    session = Session(
        command=options.command, out=out, work=work, dry=options.dry, until=until, environment=environment
    )
    before = [place / f"{options.command}.json" for place in (work, out, options.packages)]
    records = next((json.loads(path.read_text()) for path in before if path.exists()), {})
    return run_parts(session, list(COMMANDS[options.command](options.dry)), records)


if __name__ == "__main__":
    sys.exit(main())
