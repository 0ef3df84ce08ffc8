"""Run `distlora train` for each method and learning rate, skip finished runs, and report."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.families import family_of, read_config
from distlora.architecture.safetensors_headers import read_headers
from distlora.config import UserError, require
from distlora.run_folder.layout import SUMMARY_NAME, read_record
from distlora.system import atomic_io
from distlora.system.exit_codes import DONE, FAILED, STOPPED
from distlora_launcher.cli.bench.methods.grid import FACTOR, METHODS, MOST_RATES, Planned, Setup, next_round
from distlora_launcher.cli.bench.methods.results import (
    BaseDiffersError,
    check_base,
    divergences,
    figures,
    losses_of,
    plot_methods,
    reading,
    table,
)
from distlora_launcher.compose.checks import check_writable, gpu_count, linear_names
from distlora_launcher.demo.base import cache_root
from distlora_launcher.demo.run import made_base
from distlora_launcher.launch.failures import would_repeat
from distlora_launcher.launch.lock import CONFIG_NAME
from distlora_launcher.launch.processes import forwarding
from distlora_launcher.terminal.arguments import Parser
from distlora_launcher.terminal.output import shown

RESULT_NAME, REPORT_NAME, PLOT_NAME, SETUP_NAME = "methods.json", "methods.md", "methods.png", "setup.json"
STEPS, QUICK_STEPS = 48, 16
LOG_LINES = 20
"""Last lines of a failed run's log to print."""

USAGE = f"""usage: distlora bench methods [--out FOLDER] [--steps N] [--ranks N] [--seeds N] [--quick]

Compare adapter methods and full fine-tuning on the demo's base and data (`distlora demo` makes them): held-out loss,
trained parameters, memory, network traffic, time. Each figure is a real `distlora train` run; finished runs are
skipped, so a stopped comparison continues. About ten minutes on two idle cores.

Every method has the same sequences in the same order, steps and schedule, and its own learning rate: the best on the
held-out documents of a grid by factors of {FACTOR:g}, which grows until the best lies inside ({MOST_RATES} rates at
most); then other seeds at that rate.

  --out FOLDER   folder of all results (bench/methods)
  --steps N      optimizer steps per run ({STEPS}: about one pass over the data)
  --ranks N      worker processes per run (2, or the GPUs of this machine)
  --seeds N      runs of each method at its best learning rate (3)
  --quick        one learning rate, one seed, {QUICK_STEPS} steps: a check that everything works"""


def main(arguments: list[str]) -> int:
    """Run the missing runs and report. Returns the exit code: 1 for a failed run or a base that differs."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    options = parse(arguments)
    base = made_base().parent
    setup = Setup(str(base), options.steps, options.ranks, options.seeds, search=not options.quick)
    out = Path(options.out).expanduser().absolute()
    check_setup(out, setup)
    code = run_all(setup, out)
    summaries = finished(setup, out)
    return (report(setup, out, summaries) if summaries else DONE) or code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments. UserError for an unknown option or a value below 1."""
    parser = Parser("distlora bench methods", help="distlora bench methods --help")
    parser.add_argument("--out", default="bench/methods")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--ranks", type=int, default=min(2, gpu_count() or 2))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick and options.seeds is not None:
        parser.error("--quick runs one seed; leave out --seeds, or --quick")
    options.steps = options.steps if options.steps is not None else QUICK_STEPS if options.quick else STEPS
    options.seeds = options.seeds if options.seeds is not None else 1 if options.quick else 3
    for name in ("steps", "ranks", "seeds"):
        value = getattr(options, name)
        require(value > 0, f"--{name}={value} must be positive; write --{name} 1 or more")
    return options


def check_setup(out: Path, setup: Setup) -> None:
    """Create the folder. UserError if it holds runs of another setup."""
    check_writable(out, "--out")
    values = dataclasses.asdict(setup) | {"fingerprint": CheckpointFiles(Path(setup.base) / "model").fingerprint}
    earlier = read_record(out / SETUP_NAME)
    differing = [name for name, value in values.items() if name in earlier and earlier[name] != value]
    differing = [name for name in differing if name != "seeds"]  # More seeds extend the same comparison.
    if differing:
        name = differing[0]
        raise UserError(
            f"{shown(out)} holds runs with {name}={earlier[name]}, and this would be {name}={values[name]}; name "
            "another folder with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    atomic_io.write_json(out / SETUP_NAME, values)


def run_all(setup: Setup, out: Path) -> int:
    """Run rounds until none is due. Returns the exit code of the first failed run, or 0.

    A run that diverges does not count as failed: its rate is too high.
    """
    began, number = time.monotonic(), 0
    while due := next_round(setup, losses_of(finished(setup, out), diverged(setup, out))):
        for run in due:
            number += 1
            minutes = (time.monotonic() - began) / 60
            log(f"run {number} ({minutes:.0f} min): {run.method.name}, lr {run.rate:g}, seed {run.seed}")
            code = train(run, setup, out)
            if has_diverged(run, out):
                log("  diverged: its loss or gradient is not finite; counted as an infinite held-out loss")
                continue
            if code != DONE:
                return code
            summary = read_record(out / "runs" / run.folder / SUMMARY_NAME)
            log(f"  held-out loss {summary['base_eval_loss']:.4f} -> {summary['eval_loss']:.4f}")
    return DONE


def train(run: Planned, setup: Setup, out: Path) -> int:
    """Run `distlora train`, or `distlora resume` of a stopped run, as a process. Returns its exit code."""
    folder, log_file = out / "runs" / run.folder, out / "logs" / f"{run.folder}.log"
    if (folder / CONFIG_NAME).is_file():
        arguments = ["resume", str(folder)]
    else:
        arguments = ["train", *run.overrides(setup, out / "runs", cache_root() / "data")]
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("a", encoding="utf-8") as file:
        command = [sys.executable, "-m", "distlora_launcher.cli.main", *arguments]
        with forwarding() as forwarder:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
            forwarder.attach(process)
            code = process.wait()
    if forwarder.received is not None:
        log(f"stopped by {signal.Signals(forwarder.received).name}; run the same command to continue")
        return STOPPED
    if code != DONE and not has_diverged(run, out):
        tail = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        log(f"{run.folder} ended with code {code}; {shown(log_file)} ends with\n" + "\n".join(tail))
    return code


def finished(setup: Setup, out: Path) -> dict[Planned, dict[str, Any]]:
    """Return the finished runs of this setup, with their summary.json."""
    summaries = {run: read_record(out / "runs" / run.folder / SUMMARY_NAME) for run in candidates(setup)}
    return {run: summary for run, summary in summaries.items() if summary.get("eval_loss") is not None}


def diverged(setup: Setup, out: Path) -> list[Planned]:
    """Return the runs of this setup that diverged; a resume would diverge at the same step."""
    return [run for run in candidates(setup) if has_diverged(run, out)]


def has_diverged(run: Planned, out: Path) -> bool:
    """Return whether a run ended with a loss, gradient or held-out loss that is not finite (null in JSON)."""
    folder = out / "runs" / run.folder
    return would_repeat(folder / "logs") or read_record(folder / SUMMARY_NAME).get("eval_loss", 0.0) is None


def candidates(setup: Setup) -> Iterator[Planned]:
    """Yield every run that the search can reach."""
    for method in METHODS:
        for power in range(-MOST_RATES, MOST_RATES + 1):
            for seed in range(setup.seeds):
                yield Planned(method, method.rate * FACTOR**power, seed)


def report(setup: Setup, out: Path, summaries: dict[Planned, dict[str, Any]]) -> int:
    """Write and print the report. Returns 1 if the runs' bases differ."""
    base_weights, quantizable = count_weights(Path(setup.base) / "model")
    failed = diverged(setup, out)
    rows = figures(summaries, base_weights, quantizable, failed)
    try:
        bases = check_base(summaries)
    except BaseDiffersError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    agreed = ", ".join(f"{loss:.4f} on the {kind} base" for kind, loss in bases.items())
    result = {
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "setup": dataclasses.asdict(setup),
        "base": bases,
        "base_weights": base_weights,
        "quantizable_weights": quantizable,
        "rows": rows,
    }
    heading = f"{setup.steps} steps of 8 sequences of 256 tokens, {setup.ranks} rank{'s' if setup.ranks > 1 else ''}"
    shown_table, sentences = table(rows, heading), [*divergences(rows, failed), *reading(rows)]
    checked = f"Before the first step all {len(summaries)} runs have the base's held-out loss: {agreed}."
    plot_methods(rows, bases, out / PLOT_NAME)
    atomic_io.write_json(out / RESULT_NAME, result)
    text = [f"# Methods, {result['date']}", shown_table.markdown(), checked, "\n".join(f"- {s}" for s in sentences)]
    atomic_io.write_text(
        out / REPORT_NAME, "\n\n".join([*text, f"![held-out loss by method and learning rate]({PLOT_NAME})"]) + "\n"
    )
    print("\n".join(["", shown_table.text(), "", checked, *sentences]))
    print(f"\nwrote {', '.join(shown(out / name) for name in (REPORT_NAME, PLOT_NAME, RESULT_NAME))}")
    return DONE


def count_weights(model: Path) -> tuple[int, int]:
    """Return (parameters of the base, those in linears of its decoder layers), from the safetensors headers."""
    tensors = read_headers(model)
    family = family_of(read_config(model), model / "config.json")
    linears = {f"{name}.weight" for name in linear_names(tensors, family)}
    sizes = {name: math.prod(segment.shape) for name, segment in tensors.items()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name in linears)


def log(text: str) -> None:
    """Print a progress line."""
    print(text, flush=True)
