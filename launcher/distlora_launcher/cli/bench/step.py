"""`distlora bench step`: a training step of ours beside the peers', on the same model, rows and adapter, in turns."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from distlora.bench.network import take_own_network
from distlora.bench.step import curves, report
from distlora.bench.step.cells import (
    CHECKPOINTING,
    DEFAULT_SIZES,
    KEPT_PAGES,
    OURS,
    SIZES,
    WAYS,
    Cell,
    Size,
    cells_of,
    reason_against,
)
from distlora.bench.step.compare import Measured, Problem, compare, prepare, train_alone
from distlora.bench.step.running import CellFailedError
from distlora.config import nearest
from distlora.output.result_files import Results
from distlora.system.exit_codes import DONE, FAILED
from distlora_launcher.cli.bench.measuring import OUTPUT, add_output, check_output
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.demo.base import cache_root
from distlora_launcher.demo.run import made_base
from distlora_launcher.launch.workers import ON_CPU, worker_environment
from distlora_launcher.terminal.arguments import Parser, numbers

ROUNDS = 3
CURVE_LENGTH, CURVE_ROWS, CURVE_RATE = 256, 8, 1e-3
"""Of a step on the demo's base, and its learning rate."""

USAGE = f"""usage: distlora bench step [--sizes 100M] [--ranks 1,2] [--checkpointing none,block] [--steps N] ...
       distlora bench step --curve 200 [--ranks 1] [--ways NAME,NAME] [--out FOLDER] [--json]

One training step of distlora beside PEFT + bitsandbytes in a plain loop (the documented recipe, and all in bf16),
transformers' Trainer, and accelerate's FSDP2: the same random model, rows and adapter, in processes that take turns, so
that what disturbs the machine meets all of them. Tokens/s and their ratios by round, memory of a step, bytes between
ranks, losses, and what ran: on a CPU accelerate makes DistributedDataParallel of FSDP2. Peers that are not installed
are left out, by name. About twelve minutes on two quiet cores, half an hour with --sizes 100M,560M; on a GPU, slices of
Llama 3 8B and 70B.

  --sizes N,N        models: {", ".join(SIZES["cpu"])} on a CPU;
                     {", ".join(SIZES["cuda"])}, four blocks of each, on a GPU
  --ranks N,N        on so many processes, which share the cores; a GPU each (1,2)
  --checkpointing .. none, block, or none,block; else both for the smaller models and block for the larger
  --steps N          steps of each turn (1)
  --rounds N         turns of each ({ROUNDS})
  --tokens N         tokens of a row
  --rows N           rows of a step, over all processes
  --ways NAME,NAME   compare these alone:
{{ways}}
  --curve N          compare losses over N steps instead, on the demo's base and its questions and answers, from the
                     same adapter, and from a second one for what chance does (`distlora demo` makes the base)
{OUTPUT}"""


def main(arguments: list[str]) -> int:
    """Measure, and print. Returns the exit code: 1 where one of ours failed."""
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return DONE
    options = checked(arguments)
    reasons = {way: reason for way in options.ways if (reason := reason_against(way, options.device)) is not None}
    for way, reason in reasons.items():
        say(f"left out: {WAYS[way].title}: {reason}")
    ways = [way for way in options.ways if way not in reasons]
    with tempfile.TemporaryDirectory(prefix="distlora-bench-") as temporary:
        try:
            measure = measure_curves if options.curve is not None else measure_steps
            found, results = measure(options, ways, reasons, Path(temporary))
        except CellFailedError as error:
            say(f"error: {error}")
            return FAILED
        results.show(out=options.out, as_json=options.json)
        failed = [each for each in found if each.failed is not None and each.cell.way.startswith(OURS)]
        if failed:
            log = (Path(temporary) / "log").read_text(errors="replace").strip().splitlines()
            say("\n".join([*log[-30:], f"error: {failed[0].cell.title} failed: {failed[0].failed}"]))
        return FAILED if failed else DONE


def usage() -> str:
    """`distlora bench step --help`."""
    width = max(map(len, WAYS))
    lines = (
        f"    {name.ljust(width)}  {way.title}{'' if way.by_default else ' (only where it is named)'}"
        for name, way in WAYS.items()
    )
    return USAGE.format(ways="\n".join(lines))


def checked(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, of which `sizes` is what they come to. UserError for what cannot be measured."""
    parser = Parser("distlora bench step")
    for name in ("sizes", "ranks", "checkpointing", "ways"):
        parser.add_argument(f"--{name}")
    for name in ("steps", "rounds", "tokens", "rows", "curve"):
        parser.add_argument(f"--{name}", type=int)
    add_output(parser)
    options: argparse.Namespace = parser.parse_args(arguments)
    options.out = check_output(options)
    for name in ("steps", "rounds", "tokens", "rows", "curve"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}={value} is no number of them; write 1 or more")
    for name in ("sizes", "steps", "rounds", "tokens", "rows", "checkpointing"):
        if options.curve is not None and getattr(options, name) is not None:
            parser.error(f"--{name} has no effect with --curve, whose model and rows are the demo's; leave it out")
    gpus = gpu_count()
    options.device = device = "cuda" if gpus else "cpu"
    options.ways = one_of(parser, "ways", options.ways, list(WAYS)) or [n for n, way in WAYS.items() if way.by_default]
    options.checkpointing = one_of(parser, "checkpointing", options.checkpointing, CHECKPOINTING)
    names = one_of(parser, "sizes", options.sizes, list(SIZES[device])) or list(DEFAULT_SIZES[device])
    default_ranks = "1" if options.curve is not None or gpus == 1 else "1,2"
    options.ranks = numbers("--ranks", options.ranks or default_ranks)
    if 0 < gpus < max(options.ranks):
        parser.error(f"--ranks={max(options.ranks)} are more than the {gpus} GPUs that this machine shows; write fewer")
    options.sizes = {name: sized(SIZES[device][name], options) for name in names}
    rows = [CURVE_ROWS] if options.curve is not None else [size.rows for size in options.sizes.values()]
    for count in rows:
        for ranks in options.ranks:
            if count % ranks:
                parser.error(f"{count} rows of a step are no whole number for each of --ranks={ranks}; set --rows")
    for name, size in options.sizes.items():
        if max(size.lengths) > size.settings["max_position_embeddings"]:
            most = size.settings["max_position_embeddings"]
            parser.error(f"--tokens={max(size.lengths)} are more than the {most} positions of {name}; write fewer")
    if not any(WAYS[way].runs_on(ranks) for way in options.ways for ranks in options.ranks):
        parser.error(
            f"none of --ways={','.join(options.ways)} is measured on --ranks={','.join(map(str, options.ranks))}"
        )
    return options


def one_of(parser: Parser, flag: str, text: str | None, known: Sequence[str]) -> list[str] | None:
    """The words of `a,b`; None where the option is left out."""
    if text is None:
        return None
    words = text.split(",")
    for word in words:
        if word not in known:
            parser.error(f"--{flag}={word} is not known here{nearest(word, known)}; write one of {', '.join(known)}")
    return list(dict.fromkeys(words))


def sized(size: Size, options: argparse.Namespace) -> Size:
    """With what the options say of its rows."""
    lengths = size.lengths if options.tokens is None else (options.tokens,)
    return dataclasses.replace(size, rows=options.rows or size.rows, lengths=lengths)


def measure_steps(
    options: argparse.Namespace, ways: Sequence[str], reasons: Mapping[str, str], folder: Path
) -> tuple[list[Measured], Results]:
    cells = list(cells_of(options.sizes, ways, processes=options.ranks, checkpointing=options.checkpointing))
    steps, rounds = options.steps or 1, options.rounds or ROUNDS
    own_network = take_own_network()
    problems: dict[tuple[str, int], Problem] = {}

    def problem_of(cell: Cell) -> Problem:
        key = (cell.size, cell.length)
        if key not in problems:
            say(f"making a random model of {cell.size}")
            place = folder / cell.size.replace("/", "_")
            problems[key] = prepare(
                place,
                environment=worker_environment(1),
                model=place / "model",
                settings=options.sizes[cell.size].settings,
                length=cell.length,
                rows=cell.rows,
                steps=2 + steps * rounds,
            )
        return problems[key]

    groups = list(
        compare(
            cells,
            problem_of,
            rounds=rounds,
            steps=steps,
            environment=environment_of,
            log=folder / "log",
            own_network=own_network,
            say=say,
        )
    )
    results = Results(
        name="step",
        heading="A training step beside the peers",
        notes=notes(list(problems.values())[-1], reasons, f"{rounds} rounds of {steps} steps; {report.HOW}"),
        tables=[report.table(group) for group in groups],
        rows=list(report.rows(groups)),
        reading=list(report.reading(groups)),
        draw=lambda path: report.draw(groups, path),
    )
    return [each for group in groups for each in group], results


def measure_curves(
    options: argparse.Namespace, ways: Sequence[str], reasons: Mapping[str, str], folder: Path
) -> tuple[list[Measured], Results]:
    model = made_base()
    seeds = {way: (0, 1) if way in curves.SEED_WAYS else (0,) for way in ways}
    say("packing the demo's questions and answers")
    problem = prepare(
        folder,
        environment=worker_environment(1),
        model=model,
        steps=options.curve,
        seeds=(0, 1),
        data=(model.parent / "pairs.jsonl", cache_root() / "data"),
        length=CURVE_LENGTH,
        rows=CURVE_ROWS,
    )
    cells = [
        Cell(
            size="the demo's base",
            length=CURVE_LENGTH,
            rows=CURVE_ROWS,
            processes=ranks,
            checkpointing="none",
            way=way,
            seed=seed,
        )
        for ranks in options.ranks
        for way in ways
        if WAYS[way].runs_on(ranks)
        for seed in seeds[way]
    ]
    found = train_alone(
        cells, problem, steps=options.curve, environment=environment_of, log=folder / "log", lr=CURVE_RATE, say=say
    )
    results = Results(
        name="curves",
        heading=f"Losses over {options.curve} steps beside the peers",
        notes=notes(problem, reasons, f"the demo's base and data, {CURVE_ROWS} x {CURVE_LENGTH} tokens a step"),
        tables=list(curves.tables(found)),
        rows=list(curves.rows(found)),
        reading=list(curves.reading(found)),
        draw=lambda path: curves.draw(found, path),
    )
    return found, results


def environment_of(cell: Cell) -> Mapping[str, str]:
    """Of a cell's processes: ours as the launcher gives it to workers, the peers' as the user has it, but for the one
    that is to have ours, with as many threads; none asks the hub for anything."""
    environment = worker_environment(cell.processes)
    if not cell.way.startswith(OURS) and cell.way != KEPT_PAGES:
        environment = {name: text for name, text in environment.items() if name in os.environ or name not in ON_CPU}
    shown = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpu_count())))).split(",")
    if len(shown) > cell.processes:  # Trainer takes all that it sees.
        environment = {**environment, "CUDA_VISIBLE_DEVICES": ",".join(shown[: cell.processes])}
    return {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"} | environment


def notes(problem: Problem, reasons: Mapping[str, str], measured: str) -> str:
    left_out = f" Left out: {report.skipped(reasons)}." if reasons else ""
    return f"{problem.made_here}. {measured}.{left_out}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
