"""Check candidates, time them in turns, and print the rows as Markdown."""

import math
import statistics
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distlora_kernels import scratch
from distlora_kernels.dispatch import uses_triton

FORWARD, TRAINING = "forward", "forward + backward"


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second of a large copy and flops per second of a large bf16 GEMM."""

    bandwidth: float
    gemm: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to run a task; `run` returns its outputs by name."""

    name: str
    task: str
    run: Callable[[], Mapping[str, Tensor]]
    expected: Mapping[str, Tensor]
    floor: tuple[float, float] = (0.0, 0.0)
    """Fewest bytes and flops of the task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A candidate's figures; none if it is wrong or on a CPU."""

    section: str
    shape: str
    num_rows: int
    """M; 0 without rows."""
    task: str
    name: str
    fault: str
    worst_ulps: float
    seconds: float | None = None
    peak: int | None = None
    baseline: float | None = None
    """Seconds of the task's plain GEMMs."""
    floor_share: float | None = None
    floor_kind: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The section, shape and device of a comparison."""

    section: str
    shape: str
    num_rows: int
    device: torch.device
    rates: Rates | None
    """Measured rates; None where nothing is timed, such as on a CPU."""


def judge(place: Place, candidates: Iterable[Candidate], *, baseline: str = "") -> list[Row]:
    """Return each candidate's row: check all, then time the right ones in turns (where rates are measured).

    `baseline` is the candidate that the others of its task are compared with.
    """
    checked = []
    for candidate in candidates:
        try:
            worst, fault = check(candidate.run(), candidate.expected)
        except Exception as error:  # Such a candidate is wrong; the others are still measured.
            traceback.print_exc()
            worst, fault = math.nan, f"raised {type(error).__name__} (its traceback is on stderr)"
        checked.append((candidate, worst, fault))
    right = [candidate for candidate, _, fault in checked if not fault] if place.rates is not None else []
    peaks = {_key(candidate): peak_bytes(candidate.run, place.device) for candidate in right}
    times = median_seconds({_key(candidate): candidate.run for candidate in right}, place.device) if right else {}
    rows = []
    for candidate, worst, fault in checked:
        key = _key(candidate)
        seconds = times.get(key)
        share, kind = (None, "") if seconds is None or place.rates is None else _floor(candidate, place.rates, seconds)
        rows.append(
            Row(
                section=place.section,
                shape=place.shape,
                num_rows=place.num_rows,
                task=candidate.task,
                name=candidate.name,
                fault=fault,
                worst_ulps=worst,
                seconds=seconds,
                peak=peaks.get(key),
                baseline=times.get(f"{candidate.task}: {baseline}"),
                floor_share=share,
                floor_kind=kind,
            )
        )
    return rows


def _key(candidate: Candidate) -> str:
    return f"{candidate.task}: {candidate.name}"


def _floor(candidate: Candidate, rates: Rates, seconds: float) -> tuple[float | None, str]:
    """Return the share of `seconds` that the task needs at the GPU's rates, and the rate that binds."""
    nbytes, flops = candidate.floor
    bandwidth = f"copy bandwidth ({nbytes / seconds / 1e9:,.0f} GB/s)"
    least, kind = max((nbytes / rates.bandwidth, bandwidth), (flops / rates.gemm, "GEMM rate"))
    return (least / seconds if least else None), kind


_HEADINGS = ("shape (O x I, N)", "M", "task", "variant", "us", "x plain", "of the GPU", "peak MiB", "ulps")


def markdown(rows: Sequence[Row]) -> str:
    """Return one table per section; `legend` explains the figures."""
    lines = []
    for section in dict.fromkeys(row.section for row in rows):
        lines += [f"### {section}", "", f"| {' | '.join(_HEADINGS)} |", "|--" * len(_HEADINGS) + "|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in rows if row.section == section]
        lines.append("")
    return "\n".join(lines)


def legend(device: torch.device) -> str:
    """Return the explanation of the columns."""
    timed = "Median times by CUDA events, cold L2, no CUDA graphs; candidates take turns within a group."
    if device.type == "cpu":
        runs = "Triton's interpreter" if uses_triton(torch.empty(0, device=device)) else "torch implementations"
        timed = f"No figures: {runs} on the CPU. Outputs and gradients are checked; nothing is timed."
    return (
        f"{timed} `x plain`: time over that of the first row of the same task: the library's bf16 GEMMs, or "
        "transformers' operation. `of the GPU`: fraction of the measured copy bandwidth or GEMM rate, whichever binds, "
        "for the task's least work. `peak MiB`: beyond the operands, with scratch. `ulps`: the worst 64 x 64 tile of "
        "any output, in bf16 epsilons."
    )


def _cells(row: Row) -> tuple[str, ...]:
    ulps = f"{row.worst_ulps:.2f}"
    if row.fault:
        figures = [f"WRONG: {row.fault}", "", "", ""]
    else:
        figures = [
            "no figures" if row.seconds is None else f"{row.seconds * 1e6:.1f}",
            "" if row.seconds is None or row.baseline is None else f"{row.seconds / row.baseline:.2f}",
            "" if row.floor_share is None else f"{row.floor_share:.0%} of {row.floor_kind}",
            "" if row.peak is None else f"{row.peak / 2**20:.0f}",
        ]
    return (row.shape, str(row.num_rows or ""), row.task, row.name, *figures, ulps)


_TILE = 64
FORWARD_ULPS, GRADIENT_ULPS = 2.0, 4.0
"""Largest error of a tile, in epsilons of bf16: outputs, gradients."""


def worst_tile_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest ||actual - expected|| of a 64 x 64 tile over the mean norm of `expected`, in bf16 epsilons.

    One wrong tile shows, however large the matrix. NaN stays NaN. Raises ValueError if the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    error = (actual.detach().float() - expected.float()).square_().flatten(0, -2)
    rows, columns = min(_TILE, error.shape[0]), min(_TILE, error.shape[1])
    padding = (0, -error.shape[1] % columns, 0, -error.shape[0] % rows)
    if any(padding):
        error = torch.nn.functional.pad(error, padding)
    tiles = error.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).sum(dim=(1, 3))
    scale = expected.float().square().mean() * (rows * columns)
    return float((tiles.max() / scale).sqrt()) / torch.finfo(torch.bfloat16).eps


def check(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return the worst error in epsilons of bf16, and the fault, "" if there is none."""
    if actual.keys() != expected.keys():
        return float("nan"), f"gives {sorted(actual)}, expected {sorted(expected)}"
    worst, faults = 0.0, []
    for name, value in expected.items():
        error = worst_tile_error(actual[name], value)
        limit = GRADIENT_ULPS if name.startswith("d") else FORWARD_ULPS
        if not error <= limit:
            faults.append(f"{name} is {error:.2g} ulps off (at most {limit:g})")
        worst = error if error != error else max(worst, error)
    return worst, "; ".join(faults)


_FLUSH_BYTES = 2**28
"""More bytes than any L2 cache holds."""
_FLUSHES = 3
"""Flushes before each run. They also give the host about 0.3 ms to queue short sequences, so that GPU time is measured;
sequences of many small operations show the host's time, as in training."""
_WARM_UPS = 3
_SECONDS_EACH = 0.3
_FEWEST, _MOST = 5, 50


def median_seconds(runs: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Return the median seconds of each run on the GPU, by CUDA events, with a cold L2 and without CUDA graphs.

    The candidates take turns, so that a clock that drops as the GPU warms up drops for all.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    for run in runs.values():
        for _ in range(_WARM_UPS):
            run()
    slowest = max(_timed(run, flush) for run in runs.values())
    rounds = min(max(int(_SECONDS_EACH / slowest), _FEWEST), _MOST)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_timed(run, flush))
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(run: Callable[[], object], flush: torch.Tensor) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(_FLUSHES):
        flush.zero_()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes of one run over the memory before it: outputs, temporaries and our scratch."""
    scratch.reserve(device, 0)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del outputs
    return peak


_COPIED_BYTES = 2**30
_GEMM_SIZE = 8192


def measure_rates(device: torch.device) -> Rates:
    """Measure a copy of 1 GiB (2 GiB read and written) and a bf16 GEMM of 8192 x 8192 x 8192."""
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_seconds({"copy": lambda: target.copy_(source)}, device)["copy"]
    left, right = (torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    gemm = median_seconds({"gemm": lambda: torch.mm(left, right.T, out=out)}, device)["gemm"]
    return Rates(bandwidth=2 * _COPIED_BYTES / copy, gemm=2 * _GEMM_SIZE**3 / gemm)
