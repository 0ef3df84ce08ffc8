"""`distlora bench methods`: compare adapter methods and full fine-tuning on one base and data.

Each method is one change away from rsLoRA of rank 16. `distlora train` runs for each method and learning rate; finished
runs are skipped.
"""

import dataclasses
import datetime
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.config_checks import read_config
from distlora.architecture.spec import architecture_of
from distlora.config import UserError, require
from distlora.config.base import cache_root
from distlora.output.results import COLOURS, Table, new_figure, save
from distlora.run_folder.layout import SUMMARY_NAME, read_record
from distlora.system import atomic_io
from distlora.system.exit_codes import DONE, FAILED, STOPPED
from distlora_launcher.cli.bench import check_counts
from distlora_launcher.compose.checks import check_writable, gpu_count
from distlora_launcher.launch.failures import would_repeat
from distlora_launcher.launch.lock import CONFIG_NAME
from distlora_launcher.launch.processes import forwarding
from distlora_launcher.terminal.arguments import read
from distlora_launcher.terminal.output import say, shown


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table."""

    name: str
    """Name in the table; with dashes for spaces, also in the folders of its runs."""
    settings: tuple[str, ...]
    """Overrides besides COMMON."""
    rate: float
    """First learning rate of the search."""


ADAPTED = ("adapter=lora", "quant=none", "adapter.target_modules=all-linear", "adapter.r=16", "adapter.use_rslora=true")


def _but(*changed: str) -> tuple[str, ...]:
    """Return ADAPTED with some settings changed or added."""
    values = dict(word.split("=", 1) for word in (*ADAPTED, *changed))
    return tuple(f"{key}={value}" for key, value in values.items())


METHODS = (
    Method("full", ("adapter=full", "quant=none"), 5e-4),
    Method("LoRA r=8", _but("adapter.r=8", "adapter.use_rslora=false"), 4e-3),
    Method("LoRA r=64", _but("adapter.r=64", "adapter.use_rslora=false"), 4e-3),
    Method("rsLoRA r=8", _but("adapter.r=8"), 4e-3),
    Method("rsLoRA r=16", _but(), 4e-3),
    Method("rsLoRA r=64", _but("adapter.r=64"), 4e-3),
    Method("DoRA r=16", _but("adapter.use_dora=true"), 4e-3),
    Method("QLoRA r=16", _but("quant=nf4"), 4e-3),
    Method("rsLoRA r=16 qv", _but("adapter.target_modules=qv"), 4e-3),
    Method("rsLoRA r=16 attention", _but("adapter.target_modules=attention"), 4e-3),
)
"""Methods; all on attention and MLP (all-linear), unquantized and with lora_alpha=16 unless the name differs."""

COMMON = (
    "tracker=none",
    "train.dtype=bf16",
    "data.sequence_length=256",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.checkpointing=none",
    "train.log_every=8",
    "train.keep=1",
    "adapter.lora_alpha=16",
)
"""Settings of all runs, besides data, steps, seed and schedule (cosine, 3 % warm-up)."""

FACTOR = 2.0
"""Ratio of neighbouring learning rates."""
MOST_RATES = 5
"""Most learning rates per method."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings of a comparison besides the method: runs of two setups do not belong in one table."""

    model: str
    """Folder of the base."""
    data: str
    """File of the training data."""
    eval_data: str | None
    """File of the held-out documents; None for a part of the data."""
    steps: int
    ranks: int
    seeds: int
    """Runs of each method at its best learning rate."""
    search: bool
    """True if learning rates are searched; else each method has its first one."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A run: method, learning rate, seed."""

    method: Method
    rate: float
    seed: int

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return f"{self.method.name.replace(' ', '-').replace('=', '')}_lr{self.rate:g}_seed{self.seed}"

    def overrides(self, setup: Setup, runs: Path, cache_dir: Path) -> list[str]:
        """Return the overrides of `distlora train`."""
        shared = [
            word for word in COMMON if not (word.startswith("adapter.") and "adapter=full" in self.method.settings)
        ]
        return [
            f"model.path={setup.model}",
            f"data.path={setup.data}",
            *([] if setup.eval_data is None else [f"data.eval_path={setup.eval_data}"]),
            f"data.cache_dir={cache_dir}",
            f"run_dir={runs / self.folder}",
            *self.method.settings,
            *shared,
            f"train.max_steps={setup.steps}",
            f"cluster.gpus_per_node={setup.ranks}",
            f"optim.lr={self.rate:g}",
            f"train.seed={self.seed}",
        ]


Losses = Mapping[Planned, float]
"""Held-out loss by finished run; infinity if it diverged."""


def rates_of(method: Method, losses: Losses) -> dict[float, float]:
    """Return the held-out loss by learning rate of a method's runs with seed 0."""
    return {run.rate: loss for run, loss in losses.items() if run.method == method and run.seed == 0}


def best_rate(method: Method, losses: Losses) -> float | None:
    """Return the rate of the lowest held-out loss; None before the first run that did not diverge."""
    tried = {rate: loss for rate, loss in rates_of(method, losses).items() if loss < math.inf}
    return min(tried, key=tried.__getitem__) if tried else None


def next_rate(method: Method, losses: Losses) -> float | None:
    """Return the next rate: the first one, its neighbours, then further out while the best is at an end.

    None if the best lies between two others, or after MOST_RATES.
    """
    tried = rates_of(method, losses)
    for rate in (method.rate, method.rate * FACTOR, method.rate / FACTOR):
        if rate not in tried:
            return rate
    best = min(tried, key=lambda rate: (tried[rate], rate))  # If all diverged, a lower one is next.
    if len(tried) >= MOST_RATES or min(tried) < best < max(tried):
        return None
    return best * FACTOR if best == max(tried) else best / FACTOR


def next_round(setup: Setup, losses: Losses, methods: Sequence[Method] = METHODS) -> list[Planned]:
    """Return the runs that are due, one round of all methods at a time.

    Learning rates come first, then other seeds at the best rate, for methods that have one. Empty if all are done.
    """
    if setup.search:
        wanted = {method: next_rate(method, losses) for method in methods}
        searching = [Planned(method, rate, 0) for method, rate in wanted.items() if rate is not None]
        if searching:
            fewest = min(len(rates_of(run.method, losses)) for run in searching)
            return [run for run in searching if len(rates_of(run.method, losses)) == fewest]
    able = [method for method in methods if best_rate(method, losses) is not None or not rates_of(method, losses)]
    for seed in range(setup.seeds):
        due = [Planned(method, best_rate(method, losses) or method.rate, seed) for method in able]
        due = [run for run in due if run not in losses]
        if due:
            return due
    return []


Summaries = Mapping[Planned, Mapping[str, Any]]
"""Content of summary.json by finished run."""

BYTES_TRAINED = 16
"""Bytes per trained parameter: fp32 master, gradient and two optimizer states."""

SAME_ARITHMETIC = 1e-6
"""Largest relative difference of the base's held-out loss among runs on the same weights, before the first step."""


class BaseDiffersError(AssertionError):
    """Runs from one base have different losses before the first step: a method is wrong."""


def check_base(summaries: Summaries) -> dict[str, float]:
    """Return the base's held-out loss before the first step, for "unquantized" and "nf4".

    Raises BaseDiffersError, with both losses, for the run that differs most from the others.
    """
    agreed: dict[str, float] = {}
    for kind in ("unquantized", "nf4"):
        losses = {run: summary["base_eval_loss"] for run, summary in summaries.items() if base_of(run) == kind}
        if not losses:
            continue
        expected = agreed[kind] = statistics.median_low(losses.values())
        run = max(losses, key=lambda run: abs(losses[run] - expected))
        if not math.isclose(losses[run], expected, rel_tol=SAME_ARITHMETIC):
            raise BaseDiffersError(
                f"{run.folder} starts from a held-out loss of {losses[run]!r}, others on the {kind} base from "
                f"{expected!r}: {abs(losses[run] - expected) / expected:.1e} apart, and {SAME_ARITHMETIC:g} is what "
                "rounding explains"
            )
    return agreed


def base_of(run: Planned) -> str:
    """Return the kind of base of a run: unquantized or nf4."""
    return "nf4" if "quant=nf4" in run.method.settings else "unquantized"


def losses_of(summaries: Summaries, diverged: Collection[Planned]) -> dict[Planned, float]:
    """Return the held-out loss by run, infinity for diverged ones."""
    return {run: summary["eval_loss"] for run, summary in summaries.items()} | dict.fromkeys(diverged, math.inf)


def figures(
    summaries: Summaries, base_weights: int, quantizable: int, diverged: Collection[Planned] = ()
) -> list[dict[str, Any]]:
    """Return a row for each method with a finished run; the loss at a rate that diverged is None.

    `base_weights` counts the base's parameters, `quantizable` those that quant=nf4 quantizes.
    """
    losses = losses_of(summaries, diverged)
    return [
        _row(method, summaries, rates_of(method, losses), rate, base_weights, quantizable)
        for method in METHODS
        if (rate := best_rate(method, losses)) is not None
    ]


def _row(
    method: Method,
    summaries: Summaries,
    rates: Mapping[float, float],
    rate: float,
    base_weights: int,
    quantizable: int,
) -> dict[str, Any]:
    finished = {run: summary for run, summary in summaries.items() if run.method == method}
    chosen = [summary for run, summary in sorted(finished.items(), key=lambda item: item[0].seed) if run.rate == rate]
    losses = [summary["eval_loss"] for summary in chosen]
    first = chosen[0]
    return {
        "method": method.name,
        "trainable_parameters": first["trainable_parameters"],
        "eval_losses": losses,
        "eval_loss": statistics.mean(losses),
        "spread": statistics.stdev(losses) if len(losses) > 1 else None,
        "base_eval_loss": first["base_eval_loss"],
        "rate": rate,
        "rates": {f"{tried:g}": loss if loss < math.inf else None for tried, loss in sorted(rates.items())},
        "rate_is_inside": min(rates) < rate < max(rates),
        "state_bytes": state_bytes(method, first, base_weights, quantizable),
        "peak_memory_bytes": max(summary.get("peak_memory_bytes", 0) for summary in chosen),
        "gathered_bytes_per_step": first.get("gathered_bytes_per_step", 0),
        # Whole gradients if all-reduced, shards if reduce-scattered.
        "gradient_bytes_per_step": first.get("reduced_bytes_per_step", 0) + first.get("scattered_bytes_per_step", 0),
        # Other work on the machine delayed the fastest run least.
        "seconds": min(summary["train_seconds"] for summary in finished.values()),
        "runs": len(finished),
    }


def state_bytes(method: Method, summary: Mapping[str, Any], base_weights: int, quantizable: int) -> int:
    """Return the bytes of weights, masters, gradients and optimizer states over all ranks, without activations.

    Full fine-tuning's weights are its masters.
    """
    trained = BYTES_TRAINED * summary["trainable_parameters"]
    if "adapter=full" in method.settings:
        return trained
    if "quant=nf4" in method.settings:
        return round(quantizable * summary["bits_per_parameter"] / 8) + 2 * (base_weights - quantizable) + trained
    return 2 * base_weights + trained


def table(rows: Sequence[Mapping[str, Any]], heading: str) -> Table:
    """Return the table; `*` marks a learning rate at an end of those tried."""
    head = ["method", "trained", "held-out loss", "gain", "lr", "state, MiB", "peak, MiB"]
    lines = [[*head, "gradients per step, KiB", "gathered per step, MiB", "seconds"]]
    for row in rows:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
        lines.append(
            [
                row["method"],
                f"{row['trainable_parameters']:,}",
                f"{row['eval_loss']:.3f}{spread}",
                f"{row['base_eval_loss'] - row['eval_loss']:.3f}",
                f"{row['rate']:g}{'' if row['rate_is_inside'] else '*'}",
                f"{row['state_bytes'] / 2**20:.1f}",
                f"{row['peak_memory_bytes'] / 2**20:,.0f}",
                f"{row['gradient_bytes_per_step'] / 2**10:,.0f}",
                f"{row['gathered_bytes_per_step'] / 2**20:.1f}",
                f"{row['seconds']:.1f}",
            ]
        )
    return Table(heading, lines)


PAIRS = (
    ("rsLoRA r=8", "LoRA r=8", "rank-stabilized scaling at rank 8"),
    ("rsLoRA r=64", "LoRA r=64", "rank-stabilized scaling at rank 64"),
    ("rsLoRA r=64", "rsLoRA r=8", "rank 64 in place of 8"),
    ("DoRA r=16", "rsLoRA r=16", "DoRA's magnitudes"),
    ("QLoRA r=16", "rsLoRA r=16", "a base in NF4"),
    ("rsLoRA r=16", "rsLoRA r=16 qv", "every linear in place of q and v"),
    ("rsLoRA r=16", "rsLoRA r=16 attention", "every linear in place of attention"),
    ("full", "rsLoRA r=16", "training everything in place of rsLoRA r=16"),
)
"""(method, method to compare with, cause of the difference)."""


def reading(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the effect of each change on the held-out loss, beside the noise between seeds."""
    by_name = {row["method"]: row for row in rows}
    for name, against, cause in PAIRS:
        if name in by_name and against in by_name:
            yield _compare(by_name[name], by_name[against], cause)


def divergences(rows: Sequence[Mapping[str, Any]], diverged: Collection[Planned]) -> Iterator[str]:
    """Yield a sentence for each run that diverged."""
    chosen = {row["method"]: row["rate"] for row in rows}
    for run in sorted(diverged, key=lambda run: (METHODS.index(run.method), run.rate, run.seed)):
        rest = "; its row has the other seeds" if chosen.get(run.method.name) == run.rate else ""
        yield f"{run.method.name}, lr {run.rate:g}, seed {run.seed} diverged{rest}"


def _compare(row: Mapping[str, Any], other: Mapping[str, Any], cause: str) -> str:
    """Compare by two of Welch's standard errors, a rule of thumb with three seeds."""
    difference = row["eval_loss"] - other["eval_loss"]
    text = f"{cause}: {difference:+.3f} nats"
    if row["spread"] is None or other["spread"] is None:
        return f"{text} (one seed)"
    error = math.sqrt(sum(r["spread"] ** 2 / len(r["eval_losses"]) for r in (row, other)))
    verdict = "more than the noise between seeds" if abs(difference) > 2 * error else "within the noise between seeds"
    return f"{text} ± {error:.3f}, {verdict}"


def plot_methods(rows: Sequence[Mapping[str, Any]], bases: Mapping[str, float], path: Path) -> None:
    """Plot the held-out loss of each method, a dot per seed, and over the learning rates."""
    figure, (by_method, by_rate) = new_figure(2, width=11, height=4.2)
    names = [row["method"] for row in rows]
    for index, row in enumerate(rows):
        colour = COLOURS[index % len(COLOURS)]
        by_method.plot(row["eval_losses"], [index] * len(row["eval_losses"]), ".", color=colour, alpha=0.6)
        by_method.plot([row["eval_loss"]], [index], "|", markersize=16, color=colour)
        rates = [float(rate) for rate in row["rates"]]
        style = "-" if index < len(COLOURS) else "--"
        losses = [math.nan if loss is None else loss for loss in row["rates"].values()]  # None if it diverged.
        by_rate.plot(rates, losses, f".{style}", color=colour, label=row["method"])
    by_method.set_yticks(range(len(names)), names)
    by_method.invert_yaxis()
    by_method.set(xlabel=f"held-out loss, nats per token (base: {bases.get('unquantized', bases.get('nf4')):.3f})")
    by_rate.set(xlabel="learning rate", ylabel="held-out loss", xscale="log")
    by_rate.legend(frameon=False, fontsize=7)
    save(figure, path)


RESULT_NAME, REPORT_NAME, PLOT_NAME, SETUP_NAME = "methods.json", "methods.md", "methods.png", "setup.json"
STEPS, QUICK_STEPS = 48, 16
LOG_LINES = 20
"""Last lines of a failed run's log to print."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodsArguments:
    """Compare adapter methods and full fine-tuning on a base and data.

    Each figure is a real `distlora train` run: held-out loss, trained parameters, memory, network traffic, time.
    Finished runs are skipped, so a stopped comparison continues. It takes 50 to 70 short runs.

    All methods train on the same sequences in the same order, with the same steps and schedule. The learning rate of
    each is the best on held-out documents, from a grid by factors of 2 that grows until the best lies inside (at most 5
    rates). Other seeds are then trained at that rate.

    example: distlora bench methods ./Llama-3.2-1B chats.jsonl --quick
    """

    model: str
    """MODEL: folder of the base, in Hugging Face format."""
    data: str
    """DATA: file to train on, in any format of data.path."""
    eval_data: str | None = None
    """FILE: held-out documents (default: a part of the data, data.eval_fraction)."""
    out: str = "bench/methods"
    """FOLDER: folder for all results."""
    steps: int | None = None
    """N: optimizer steps per run (default: 48, about one pass over the data)."""
    ranks: int | None = None
    """N: worker processes per run (default: 2, or the number of GPUs on this node)."""
    seeds: int | None = None
    """N: runs of each method at its best learning rate (default: 3)."""
    quick: bool = False
    """Run one learning rate, one seed, 16 steps: a check that everything works."""


def main(arguments: list[str]) -> int:
    """Run the missing runs and report. Returns the exit code: 1 for a failed run or a base that differs."""
    options = read(MethodsArguments, "distlora bench methods", arguments)
    check_counts(options)
    for name, file in (("DATA", options.data), ("--eval-data", options.eval_data)):
        require(file is None or Path(file).expanduser().is_file(), f"{name}={file} is not a file; name one")
    read_config(Path(options.model).expanduser().absolute())
    require(not options.quick or options.seeds is None, "--quick runs one seed; leave out --seeds, or --quick")
    setup = Setup(
        model=str(Path(options.model).expanduser().absolute()),
        data=str(Path(options.data).expanduser().absolute()),
        eval_data=None if options.eval_data is None else str(Path(options.eval_data).expanduser().absolute()),
        steps=options.steps or (QUICK_STEPS if options.quick else STEPS),
        ranks=options.ranks or min(2, gpu_count() or 2),
        seeds=options.seeds or (1 if options.quick else 3),
        search=not options.quick,
    )
    out = Path(options.out).expanduser().absolute()
    check_setup(out, setup)
    code = run_all(setup, out)
    summaries = finished(setup, out)
    return (report(setup, out, summaries) if summaries else DONE) or code


def check_setup(out: Path, setup: Setup) -> None:
    """Create the folder. UserError if it holds runs of another setup."""
    check_writable(out, "--out")
    values = dataclasses.asdict(setup) | {"fingerprint": CheckpointFiles(Path(setup.model)).fingerprint}
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
            say(f"run {number} ({minutes:.0f} min): {run.method.name}, lr {run.rate:g}, seed {run.seed}")
            code = train(run, setup, out)
            if has_diverged(run, out):
                say("  diverged: its loss or gradient is not finite; counted as an infinite held-out loss")
                continue
            if code != DONE:
                return code
            summary = read_record(out / "runs" / run.folder / SUMMARY_NAME)
            say(f"  held-out loss {summary['base_eval_loss']:.4f} -> {summary['eval_loss']:.4f}")
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
        say(f"stopped by {signal.Signals(forwarder.received).name}; run the same command to continue")
        return STOPPED
    if code != DONE and not has_diverged(run, out):
        tail = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        say(f"{run.folder} ended with code {code}; {shown(log_file)} ends with\n" + "\n".join(tail))
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
    base_weights, quantizable = count_weights(Path(setup.model))
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
    """Return (parameters of the base, those in linears of its decoder layers), from config.json."""
    architecture = architecture_of(read_config(model), model / "config.json")
    linears = sum(weight.numel for _, weight in architecture.adaptable() if weight.kind == "linear")
    return architecture.numel, linears
