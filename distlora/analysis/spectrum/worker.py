"""The worker of `distlora analyze spectrum`: weight after weight, then the files and the tables."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from distlora.analysis.spectrum import figures, report
from distlora.analysis.spectrum.changes import Change, Changes, open_changes
from distlora.analysis.spectrum.decomposed import largest
from distlora.analysis.spectrum.plots import plot_spectrum
from distlora.analysis.spectrum.request import PLOT_NAME, REPORT_NAME, RESULT_NAME, SpectrumRequest
from distlora.config import UserError
from distlora.output.result_files import Written
from distlora.post.workers import made_on
from distlora.system.exit_codes import DONE, run_to_exit_code
from distlora.system.progress import Progress, quieten
from distlora.weights.reader import Reader

WRITTEN = Written(RESULT_NAME, REPORT_NAME, PLOT_NAME, report, plot_spectrum)


def run(request: SpectrumRequest) -> dict[str, Any]:
    """Everything that the request asks for; tables on stdout, progress on stderr."""
    say = Progress()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(open_changes(request.first.read()))
        against = None if request.against is None else stack.enter_context(open_changes(request.against.read()))
        found = analysed(request, first, against, device, say)
    WRITTEN.write(Path(request.out), found)
    return found


def analysed(
    request: SpectrumRequest, first: Changes, against: Changes | None, device: torch.device, say: Progress
) -> dict[str, Any]:
    """spectrum.json."""
    names = [name for name in first.names if against is None or name in against.names]
    if not names:
        raise UserError(
            f"{request.first_name} and {request.against_name} changed no weight in common, so there is nothing to "
            "compare; leave out --against, or name another run"
        )
    say.line(f"{len(names):,} weights of {first.folder}" + (f" and {against.folder}" if against else ""))
    found = describe(request, first, against, device) | {"left_out": len(first.names) - len(names)}
    found["weights"] = list(measured(names, first, against, request, device, say))
    found["first"] = together(found["weights"])
    if against is not None:
        found["against"] = together([weight["against"] for weight in found["weights"]])
    return found


def measured(
    names: list[str],
    first: Changes,
    against: Changes | None,
    request: SpectrumRequest,
    device: torch.device,
    say: Progress,
) -> Iterator[dict[str, Any]]:
    """Yield an entry for each matrix."""
    began, total, done = time.monotonic(), sum(map(first.numel, names)), 0
    with Reader() as reader, Reader() as other_reader:
        for number, name in enumerate(names, start=1):
            others = iter(()) if against is None else against.of(name, other_reader)
            for change in first.of(name, reader):
                moved = change.to(device)
                entry, delta = figures.measure(moved, request)
                other = next(others, None)
                if other is not None:
                    entry["against"], theirs = figures.measure(other.to(device), request)
                    entry["angles"] = compared(entry, moved, delta, other.to(device), theirs, request)
                yield entry
            done += first.numel(name)
            left = (time.monotonic() - began) * (total - done) / done
            say(f"{number:,}/{len(names):,} weights, {name}; {left / 60:,.0f} min left")


def compared(
    entry: dict[str, Any], change: Change, delta: Any, other: Change, theirs: Any, request: SpectrumRequest
) -> dict[str, Any] | None:
    """Principal angles between the two dW: over the smaller of their ranks, or `top` where neither has a low one."""
    ranks = [e["delta"]["rank"] for e in (entry, entry["against"]) if e["delta"]["rank"] is not None]
    rank = min([r for r in ranks if r < min(change.before.shape)] or [request.top])
    if rank == 0 or not len(delta.values) or not len(theirs.values):
        return None
    # Of a large dense dW only the first few were found so far.
    if len(delta.values) < rank:
        delta = largest(change.delta(), rank)
    if len(theirs.values) < rank:
        theirs = largest(other.delta(), rank)
    of_theirs = entry["against"]["delta"]
    dense = other.delta() if of_theirs["rank"] is None else None
    return figures.angles(delta, theirs, rank, of_theirs["norm"], dense)


def together(weights: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums of one run."""
    return {
        "overall": figures.summed(weights),
        "layers": figures.grouped(weights, lambda weight: weight["layer"]),
        "linears": figures.grouped(weights, lambda weight: weight["linear"]),
    }


def describe(request: SpectrumRequest, first: Changes, against: Changes | None, device: torch.device) -> dict[str, Any]:
    """Return the environment of the figures."""
    runs = {"first": (request.first_name, first), "against": (request.against_name, against)}
    command = f"distlora analyze spectrum {request.first_name}"
    if against is not None:
        command += f" --against {request.against_name}"
    return made_on(device, "torch") | {
        "command": command,
        "top": request.top,
        "thresholds": list(request.thresholds),
        "exact_up_to": request.exact_up_to,
        "runs": {
            key: {"name": name, "method": changes.method, "weights": changes.folder.name, "rounded": changes.rounded_to}
            for key, (name, changes) in runs.items()
            if changes is not None
        },
    }


def main(request: SpectrumRequest) -> int:
    """Analyze; return the exit code."""
    quieten()

    def work() -> int:
        run(request)
        return DONE

    return run_to_exit_code(work)
