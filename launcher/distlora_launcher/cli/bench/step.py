"""`distlora bench step`: a training step of ours beside other libraries, on the same model, sequences and adapter."""

import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.architecture.config_checks import check_config, read_config
from distlora.bench.step import report
from distlora.bench.step.compare import (
    CHECKPOINTING,
    DEFAULT_SIZES,
    DEMO,
    KEPT_PAGES,
    OURS,
    SIZES,
    WAYS,
    Cell,
    CellFailedError,
    Checkpointing,
    Measured,
    Runner,
    Size,
    StepInputs,
    cells_of,
    prepare,
    reason_against,
)
from distlora.config import ModelConfig, UserError, nearest, require
from distlora.config.base import cache_root
from distlora.output.results import Results
from distlora.system.exit_codes import DONE, FAILED
from distlora.system.progress import say
from distlora_launcher.cli.bench import check_counts, check_gpus, output_folder
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.compose.hub import localize
from distlora_launcher.demo.model import DATA, smollm2
from distlora_launcher.launch.workers import ON_CPU, worker_environment
from distlora_launcher.terminal.arguments import listed, read

NAMES = {"model.path": "--model", "data.sequence_length": "--tokens"}
"""Arguments for the settings that messages name."""
CURVE_LENGTH, CURVE_ROWS, CURVE_RATE = 256, 8, 1e-3
"""Tokens per sequence, sequences per step and learning rate of a loss curve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepArguments:
    """Measure a training step of distlora beside other libraries: the same model, sequences and adapter.

    The others are PEFT + bitsandbytes in a plain loop (the documented recipe, and all in bf16), transformers' Trainer
    and accelerate's FSDP2, in processes that take turns. Prints tokens/s, their ratios per round, memory, network
    traffic, losses, and the parallel class that ran: on a CPU accelerate replaces FSDP2 by DistributedDataParallel.
    Libraries that are not installed are named and skipped. About forty minutes on two idle cores, two thirds of it for
    the model of `distlora demo` with its real weights; on a GPU, slices of Llama 3 8B and 70B.

    example: distlora bench step --sizes 8M --ways ours,peft-documented
    """

    sizes: tuple[str, ...] | None = None
    """N,N: model sizes, listed below."""
    model: str | None = None
    """FOLDER: a model in Hugging Face format, instead of the default sizes."""
    ranks: tuple[int, ...] | None = None
    """N,N: numbers of processes, one per GPU; on a CPU they share the cores (default: 1,2)."""
    checkpointing: tuple[str, ...] | None = None
    """none,block: activation checkpointing modes (default: both for smaller models, block for larger ones)."""
    steps: int | None = None
    """N: steps per turn (default: 1)."""
    rounds: int | None = None
    """N: turns of each library (default: 3)."""
    tokens: int | None = None
    """N: tokens per sequence."""
    rows: int | None = None
    """N: sequences per step, over all processes."""
    ways: tuple[str, ...] | None = None
    """NAME,NAME: compare only these libraries, listed below under ways."""
    curve: int | None = None
    """N: compare loss curves over N steps instead, on the model and data of `distlora demo`, from the same initial
    adapter, and from a second one to measure noise."""
    out: str | None = None
    """FOLDER: folder for the results as Markdown, CSV and a plot."""
    json: bool = False
    """Print every figure as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBench:
    """The measurement of `distlora bench step`."""

    device: str
    """cpu or cuda."""
    sizes: dict[str, Size]
    ranks: tuple[int, ...]
    """Process counts."""
    ways: tuple[str, ...]
    checkpointing: tuple[Checkpointing, ...] | None
    """Modes for all sizes; None for each size's defaults."""
    steps: int
    """Steps per turn."""
    rounds: int
    """Turns of each cell."""
    curve: int | None
    """Steps of the loss curves; None to measure steps."""
    out: str | None
    json: bool

    @property
    def reasons(self) -> dict[str, str]:
        """Return the reason by way that cannot be measured on this node."""
        reasons = {way: reason_against(way, self.device) for way in self.ways}
        return {way: reason for way, reason in reasons.items() if reason is not None}


def main(arguments: list[str]) -> int:
    """Measure and print. Returns the exit code: 1 if one of ours failed."""
    request = parse(arguments)
    for way, reason in request.reasons.items():
        say(f"left out: {WAYS[way].title}: {reason}")
    with tempfile.TemporaryDirectory(prefix="distlora-bench-") as temporary:
        try:
            measure = measure_steps if request.curve is None else measure_curves
            cells, results = measure(request, Path(temporary))
        except CellFailedError as error:
            say(f"error: {error}")
            return FAILED
        results.show(out=None if request.out is None else Path(request.out), as_json=request.json)
        failed = [each for each in cells if each.failed is not None and each.cell.way.startswith(OURS)]
        if failed:
            lines = (Path(temporary) / "log").read_text(errors="replace").strip().splitlines()
            say("\n".join([*lines[-30:], f"error: {failed[0].cell.title} failed: {failed[0].failed}"]))
        return FAILED if failed else DONE


def parse(arguments: Sequence[str]) -> StepBench:
    """Return the request. UserError for an unknown option or a combination that cannot be measured."""
    known = {f"sizes on {'a CPU' if kind == 'cpu' else 'a GPU'}": ", ".join(SIZES[kind]) for kind in ("cpu", "cuda")}
    ways = {name: f"{way.title}{'' if way.by_default else ' (only if named)'}" for name, way in WAYS.items()}
    epilog = f"{listed(known)}\n\nways:\n{listed(ways)}"
    options = read(StepArguments, "distlora bench step", arguments, epilog=epilog)
    check_counts(options)
    for name in ("sizes", "model", "steps", "rounds", "tokens", "rows", "checkpointing"):
        require(
            options.curve is None or getattr(options, name) is None,
            f"--{name} has no effect with --curve, which has the demo's model and sequences; leave it out",
        )
    gpus = gpu_count()
    device = "cuda" if gpus else "cpu"
    for name, words in {"sizes": SIZES[device], "checkpointing": CHECKPOINTING, "ways": WAYS}.items():
        for word in getattr(options, name) or ():
            near = nearest(word, words)
            require(word in words, f"--{name}={word} is not known{near}; write one of {', '.join(words)}")
    modes, lengths = options.checkpointing, () if options.tokens is None else (options.tokens,)
    sizes = {name: size for name, size in SIZES[device].items() if name in (options.sizes or DEFAULT_SIZES[device])}
    if options.model is not None:
        folder = Path(options.model).expanduser().absolute()
        real = Size(model=str(folder), rows=4, lengths=(512,), checkpointing=CHECKPOINTING)
        sizes = {folder.name: real} | (sizes if options.sizes else {})
    request = StepBench(
        device=device,
        sizes={
            name: dataclasses.replace(size, rows=options.rows or size.rows, lengths=lengths or size.lengths)
            for name, size in sizes.items()
        },
        ranks=options.ranks or ((1,) if options.curve is not None or gpus == 1 else (1, 2)),
        ways=options.ways or tuple(name for name, way in WAYS.items() if way.by_default),
        checkpointing=None if modes is None else tuple(mode for mode in CHECKPOINTING if mode in modes),
        steps=options.steps or 1,
        rounds=options.rounds or 3,
        curve=options.curve,
        out=output_folder(options.out),
        json=options.json,
    )
    check_gpus(request.ranks)
    check_sizes(request)
    return request


def check_sizes(request: StepBench) -> None:
    """Raise UserError for sequences that do not divide over the ranks, are too long, or for ways that run nowhere."""
    for rows in [CURVE_ROWS] if request.curve is not None else [size.rows for size in request.sizes.values()]:
        for ranks in request.ranks:
            require(rows % ranks == 0, f"{rows} sequences per step are not a multiple of --ranks={ranks}; set --rows")
    for name, size in request.sizes.items():
        longest, most = max(size.lengths), size.settings.get("max_position_embeddings")
        require(
            most is None or longest <= most, f"--tokens={longest} exceeds the {most} positions of {name}; write fewer"
        )
        if size.model not in (None, DEMO):
            folder = Path(size.model)
            check_config(read_config(folder), folder / "config.json", sequence_length=longest)
    require(
        any(WAYS[way].runs_on(ranks) for way in request.ways for ranks in request.ranks),
        f"none of --ways={','.join(request.ways)} can be measured on --ranks={','.join(map(str, request.ranks))}",
    )


def measure_steps(request: StepBench, folder: Path) -> tuple[list[Measured], Results]:
    """Measure all cells in turns, on random tokens."""
    ways = [way for way in request.ways if way not in request.reasons]
    sizes = with_demo(request.sizes)
    cells = list(cells_of(sizes, ways, processes=request.ranks, checkpointing=request.checkpointing))
    runner = Runner(environment=environment_of, log=folder / "log", log_line=say)
    by_group = [list(members) for _, members in itertools.groupby(cells, key=lambda cell: cell.group)]
    problems: dict[tuple[str, int], StepInputs] = {}
    groups, machine = [], ""
    for number, members in enumerate(by_group, 1):
        cell = members[0]
        key, place = (cell.size, cell.length), folder / cell.size.replace("/", "_")
        if key not in problems:
            size, model = sizes[cell.size], place / "model"
            if size.model is None:
                say(f"writing a random model of {cell.size}")
            made: dict[str, Any] = {"model": str(model), "settings": json.dumps(size.settings)}
            problems[key] = StepInputs(
                folder=str(place),
                **(made if size.model is None else real_model(size.model, model)),
                length=cell.length,
                rows=cell.rows,
                steps=2 + request.steps * request.rounds,
            )
            machine = prepare(problems[key], worker_environment(1))
        say(f"{cell.problem} ({number} of {len(by_group)})")
        groups.append(runner.compare(members, problems[key], rounds=request.rounds, steps=request.steps))
    method = f"{request.rounds} rounds of {request.steps} steps; {report.HOW}"
    results = Results(
        name="step",
        heading="A training step beside other libraries",
        notes=notes(machine, request, method),
        tables=[report.table(group) for group in groups],
        rows=list(report.rows(groups)),
        reading=list(report.reading(groups)),
        draw=lambda path: report.draw(groups, path),
    )
    return [each for group in groups for each in group], results


def with_demo(sizes: Mapping[str, Size]) -> dict[str, Size]:
    """Return the sizes with the folder of the demo's model, which is left out if it cannot be had and others can."""
    there = dict(sizes)
    if DEMO in there:
        try:
            there[DEMO] = dataclasses.replace(there[DEMO], model=str(smollm2(say)))
        except UserError as error:
            if len(sizes) == 1:
                raise
            say(f"left out: {DEMO}: {error}")
            del there[DEMO]
    return there


def real_model(model: str, folder: Path) -> dict[str, Any]:
    """Return the fields of StepInputs that name a real model; a GGUF file is to be written to `folder`."""
    local = localize(ModelConfig(path=model))
    return {"model": local.path} if local.gguf_file is None else {"model": str(folder), "gguf": local.path}


def measure_curves(request: StepBench, folder: Path) -> tuple[list[Measured], Results]:
    """Train each cell alone on the demo's model and data."""
    assert request.curve is not None
    ways = [way for way in request.ways if way not in request.reasons]
    model = smollm2(say)
    say("packing the demo's chats")
    inputs = StepInputs(
        folder=str(folder),
        **real_model(str(model), folder / "model"),
        length=CURVE_LENGTH,
        rows=CURVE_ROWS,
        steps=request.curve,
        seeds=(0, 1),
        data=str(model.parent / DATA),
        cache_dir=str(cache_root() / "data"),
    )
    machine = prepare(inputs, worker_environment(1))
    cells = [
        Cell(
            size="the demo's model",
            length=CURVE_LENGTH,
            rows=CURVE_ROWS,
            processes=ranks,
            checkpointing="none",
            way=way,
            seed=seed,
        )
        for ranks in request.ranks
        for way in ways
        if WAYS[way].runs_on(ranks)
        for seed in ((0, 1) if way in report.SEED_WAYS else (0,))
    ]
    runner = Runner(environment=environment_of, log=folder / "log", log_line=say)
    curves = runner.train_alone(cells, inputs, steps=request.curve, lr=CURVE_RATE)
    method = f"the demo's model and chats, {CURVE_ROWS} x {CURVE_LENGTH} tokens per step"
    results = Results(
        name="curves",
        heading=f"Losses over {request.curve} steps beside other libraries",
        notes=notes(machine, request, method),
        tables=list(report.curve_tables(curves)),
        rows=list(report.curve_rows(curves)),
        reading=list(report.curve_reading(curves)),
        draw=lambda path: report.draw_curves(curves, path),
    )
    return curves, results


def environment_of(cell: Cell) -> Mapping[str, str]:
    """Return the environment of a cell's processes, with as many threads for all and without access to the hub.

    Ours get the variables that the launcher sets for workers; peers get the user's, but for KEPT_PAGES.
    """
    environment = worker_environment(cell.processes)
    if not cell.way.startswith(OURS) and cell.way != KEPT_PAGES:
        environment = {name: text for name, text in environment.items() if name in os.environ or name not in ON_CPU}
    visible = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpu_count())))).split(",")
    if len(visible) > cell.processes:  # Trainer uses every visible GPU.
        environment = {**environment, "CUDA_VISIBLE_DEVICES": ",".join(visible[: cell.processes])}
    return {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"} | environment


def notes(machine: str, request: StepBench, method: str) -> str:
    """Return the line below the tables: machine, method, ways left out."""
    left_out = "; ".join(f"{WAYS[way].title}: {why}" for way, why in request.reasons.items())
    return f"{machine}. {method}." + (f" Left out: {left_out}." if left_out else "")
