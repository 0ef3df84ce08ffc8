"""Candidates, and the rows that they become: checked, then timed, then printed as Markdown."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distlora_kernels.dispatch import uses_triton

from .checks import check
from .clock import median_seconds, peak_bytes
from .rates import Rates, Step, predicted_seconds

FORWARD, TRAINING = "forward", "forward + backward"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to do a task. `run` returns its outputs by name."""

    name: str
    task: str
    run: Callable[[], Mapping[str, Tensor]]
    expected: Mapping[str, Tensor]
    steps: Sequence[Step] = ()
    """Its launches, if they are counted."""
    floor: tuple[float, float] = (0.0, 0.0)
    """Bytes and flops that the task cannot do without."""
    slack: float = 1.0
    """How many times the rounding noise of one linear is allowed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A candidate's figures; no figures where it is wrong, or where nothing can be timed."""

    section: str
    shape: str
    num_rows: int
    """M, 0 where there is none."""
    task: str
    name: str
    fault: str
    worst_ulps: float
    predicted: float
    seconds: float | None = None
    peak: int | None = None
    baseline: float | None = None
    """Seconds of the plain GEMMs of this task."""
    floor_share: float | None = None
    floor_kind: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the candidates are compared."""

    section: str
    shape: str
    num_rows: int
    device: torch.device
    rates: Rates


def judge(place: Place, candidates: Iterable[Candidate], *, baseline: str = "") -> list[Row]:
    """Every candidate's row: each is checked first; those that are right are then timed in turns. On the CPU, which has
    no figures, they are checked alone. `baseline` is the candidate that the others of its task are compared with.
    """
    checked = []
    for candidate in candidates:
        checked.append((candidate, *_checked(candidate)))
    right = [candidate for candidate, _, fault in checked if not fault] if place.device.type == "cuda" else []
    peaks = {_key(candidate): peak_bytes(candidate.run, place.device) for candidate in right}
    times = median_seconds({_key(candidate): candidate.run for candidate in right}, place.device) if right else {}
    rows = []
    for candidate, worst, fault in checked:
        key, floor = _key(candidate), _floor(candidate, place.rates)
        seconds = times.get(key)
        rows.append(
            Row(
                section=place.section,
                shape=place.shape,
                num_rows=place.num_rows,
                task=candidate.task,
                name=candidate.name,
                fault=fault,
                worst_ulps=worst,
                predicted=predicted_seconds(candidate.steps, place.rates),
                seconds=seconds,
                peak=peaks.get(key),
                baseline=times.get(f"{candidate.task}: {baseline}"),
                floor_share=floor[0] / seconds if seconds is not None and floor[0] else None,
                floor_kind=floor[1],
            )
        )
    return rows


def _checked(candidate: Candidate) -> tuple[float, str]:
    """-> the worst error, and what is wrong. A candidate that raises is wrong, and the others are still measured."""
    try:
        return check(candidate.run(), candidate.expected, slack=candidate.slack)
    except Exception as error:
        traceback.print_exc()
        return math.nan, f"raised {type(error).__name__} (its traceback is on stderr)"


def _key(candidate: Candidate) -> str:
    return f"{candidate.task}: {candidate.name}"


def _floor(candidate: Candidate, rates: Rates) -> tuple[float, str]:
    """Seconds that the task takes at the card's rates at least, and which rate says so."""
    nbytes, flops = candidate.floor
    return max((nbytes / rates.bandwidth, "copy bandwidth"), (flops / rates.gemm, "GEMM rate"))


_HEADINGS = (
    "shape (O x I)",
    "M",
    "task",
    "variant",
    "us",
    "x plain",
    "of the card",
    "predicted us",
    "peak MiB",
    "ulps",
)


def markdown(rows: Sequence[Row]) -> str:
    """A table for each section; the figures are explained by `legend`."""
    lines = []
    for section in dict.fromkeys(row.section for row in rows):
        lines += [f"### {section}", "", f"| {' | '.join(_HEADINGS)} |", "|--" * len(_HEADINGS) + "|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in rows if row.section == section]
        lines.append("")
    return "\n".join(lines)


def legend(device: torch.device) -> str:
    timed = "Median times by CUDA events, cold L2, no CUDA graphs; candidates take turns within one row group."
    if device.type == "cpu":
        runs = "Triton's interpreter" if uses_triton(torch.empty(0, device=device)) else "torch implementations"
        timed = f"No figures: {runs} on the CPU. Outputs and gradients are checked; nothing is timed."
    return (
        f"{timed} `x plain`: time over that of the first row of the same task, the library's bf16 GEMMs. "
        "`of the card`: the share of the measured copy bandwidth or GEMM rate, whichever binds, that the task's least "
        "work takes. `predicted us`: bytes and flops of each launch at these rates, 3 us a launch; of a block the "
        "linears and the attention alone. `peak MiB`: beyond the operands, scratch included. `ulps`: the worst 64 x 64 "
        "tile of any output, in epsilons of bf16."
    )


def _cells(row: Row) -> tuple[str, ...]:
    ulps = f"{row.worst_ulps:.2f}"
    if row.fault:
        figures = [f"WRONG: {row.fault}", "", "", "", ""]
    else:
        figures = [
            "no figures" if row.seconds is None else f"{row.seconds * 1e6:.1f}",
            "" if row.seconds is None or row.baseline is None else f"{row.seconds / row.baseline:.2f}",
            "" if row.floor_share is None else f"{row.floor_share:.0%} of {row.floor_kind}",
            f"{row.predicted * 1e6:.0f}" if row.predicted else "",
            "" if row.peak is None else f"{row.peak / 2**20:.0f}",
        ]
    return (row.shape, str(row.num_rows or ""), row.task, row.name, *figures, ulps)
