"""Time a training step of distlora beside other libraries, on the same model, sequences and adapter.

    python benchmarks/step.py                                    100M and SmolLM2: forty minutes on two idle cores
    python benchmarks/step.py --sizes 8M --ways ours,peft-bf16   a few minutes
    python benchmarks/step.py --model ./Llama-3.2-1B --ranks 1   a model of yours, in Hugging Face format

The others are PEFT + bitsandbytes in a plain loop (the documented recipe, all in bf16 or fp32, torch.compile) and
accelerate's FSDP2, which it replaces by DistributedDataParallel on a CPU. All have an adapter of r = 16 on every
linear, on NF4 with double quantization. Each way is a process (or one per rank) that stays alive; they take turns, and
a ratio compares turns of one round. Libraries that are not installed are named and left out.
README.md in this folder says what the figures are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

import step_worker
from distlora.architecture.config_checks import check_config, read_config
from distlora.architecture.shapes import ARCHITECTURES
from distlora.config import Config, ModelConfig, UserError
from distlora.config.file import build
from distlora.loading.peft_format import weight_files
from distlora.loading.tensor_files import write_files
from distlora.parallel import Ranks
from distlora.post.merge_worker import merge_to
from distlora.post.trained import Trained, base_spec
from distlora.results.record import Table
from distlora.system.progress import say
from distlora.training.setup import start_run_model
from distlora_kernels import native
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.compose.hub import localize
from distlora_launcher.demo.model import smollm2
from distlora_launcher.launch.workers import ON_CPU, worker_environment
from measuring import libraries_print_to_stderr, measurement_notes, names_of, number, numbers, parser_of, show, spread
from step_worker import Job
from support.measured import anonymous_bytes, free_port, ignore, llama, set_environment, write_random_checkpoint

MIB = 2**20
DEMO = "SmolLM2"
"""The model of `distlora demo`, with its real weights in bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model and the step that is measured."""

    settings: dict[str, Any] = field(default_factory=dict)
    """config.json of a random Llama; empty for a real model."""
    rows: int = 4
    """Sequences per step, over all processes."""
    lengths: tuple[int, ...] = (512,)
    """Tokens per sequence, each measured."""
    checkpointing: tuple[str, ...] = ("none", "block")


def _small(hidden: int, inner: int, layers: int) -> dict[str, Any]:
    return llama(vocabulary=4096, hidden=hidden, inner=inner, layers=layers, heads=hidden // 64, kv_heads=hidden // 256)


def _slice(name: str) -> Size:
    settings = {key: value for key, value in ARCHITECTURES[name].items() if key != "model_type"}
    settings |= {"num_hidden_layers": 4}
    return Size(settings=settings, rows=2, lengths=(2048, 8192), checkpointing=("block",))


SIZES = {
    "8M": Size(settings=_small(256, 704, 8)),
    "100M": Size(settings=_small(1024, 2816, 8)),
    "560M": Size(settings=_small(2048, 5632, 12), rows=2, checkpointing=("block",)),
    DEMO: Size(),
    "8B/4": _slice("meta-llama/Llama-3.1-8B"),
    "70B/4": _slice("meta-llama/Llama-3.1-70B"),
}
"""The last two are four decoder layers of the named models, for a GPU."""

PEFT = ("peft", "bitsandbytes")
RECIPE, IN_BF16, IN_FP32 = (f"PEFT + bitsandbytes, {recipe}" for recipe in ("documented", "all in bf16", "all in fp32"))
OURS = "ours"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to train."""

    title: str
    job: dict[str, Any]
    """Fields of its Job."""
    needs: tuple[str, ...] = ()
    """Packages that are no dependencies of ours."""
    processes: tuple[int, ...] = (1, 2)
    """Process counts; 2 stands for any number above 1."""
    by_default: bool = True


_LOOP, _PLAIN, _COMPILED = ({"runs": "loop", "recipe": recipe} for recipe in ("documented", "plain", "compiled"))
_FP32 = {"dtype": "float32"}
WAYS: dict[str, Way] = {
    OURS: Way("distlora, NF4", {"runs": "ours"}),
    "ours-uncompiled": Way("distlora, NF4, train.compile=false", {"runs": "ours", "compile": False}),
    "ours-bf16": Way("distlora, bf16 base", {"runs": "ours", "base": "none"}, processes=(1,)),
    "peft-documented": Way(RECIPE, _LOOP, PEFT),
    "peft-bf16": Way(IN_BF16, _PLAIN, PEFT),
    "peft-bf16-compiled": Way(f"{IN_BF16}, torch.compile", _COMPILED, PEFT),
    "peft-fp32": Way(IN_FP32, _PLAIN | _FP32, PEFT),
    "peft-fp32-compiled": Way(f"{IN_FP32}, torch.compile", _COMPILED | _FP32, PEFT, by_default=False),
    "fsdp2": Way(f"accelerate FSDP2 + {RECIPE}", {"runs": "fsdp2"}, (*PEFT, "accelerate"), processes=(2,)),
}
REFERENCES = (OURS, "ours-uncompiled")
"""Ways of ours that the peers are compared with."""


def reason_against(way: str, device: str) -> str | None:
    """Return why a way cannot be measured on this "cpu" or "cuda" device; None if it can."""
    missing = [each for each in WAYS[way].needs if not any(importlib.metadata.distributions(name=each))]
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    if way == "ours-uncompiled" and device == "cuda":
        return "train.compile=auto is false on a GPU"
    return native.unavailable_reason() if device == "cpu" and WAYS[way].job.get("recipe") == "compiled" else None


@dataclass(slots=True)
class Measured:
    """One way to train one model on a number of processes, and its figures."""

    problem: str
    way: str
    tokens: int
    """Tokens per step."""
    processes: int
    failed: str = ""
    ran: str = ""
    imported: int = 0
    """Anonymous bytes of a process after its imports; 0 on a GPU."""
    seconds: list[list[float]] = field(default_factory=list)
    """Seconds of the slowest process, by round and step."""
    cpu_seconds: list[float] = field(default_factory=list)
    """CPU seconds of each step, over all processes."""
    losses: list[float] = field(default_factory=list)
    """Loss of every step from the first on, the mean over the processes."""
    peak: int = 0
    """Peak bytes of a process in its timed turns; on a GPU those that torch allocated."""

    @property
    def is_whole(self) -> bool:
        """True if it completed all its turns."""
        return bool(self.seconds) and not self.failed

    @property
    def over_imports(self) -> int:
        """Peak bytes over the memory after imports."""
        return max(1, self.peak - self.imported)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each step."""
        return [self.tokens / second for seconds in self.seconds for second in seconds]

    def ratios(self, other: Measured) -> list[float]:
        """Return this way's speed over the other's, by round."""
        return [sum(theirs) / sum(own) for own, theirs in zip(self.seconds, other.seconds, strict=False)]


class Processes:
    """The processes of a way, as a context manager; they wait for their turns."""

    def __init__(self, job: Job, count: int, environment: Mapping[str, str]) -> None:
        context, port = multiprocessing.get_context("spawn"), free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        with set_environment(environment):
            for rank in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=step_worker.main, args=(job, rank, count, port, theirs))
                process.start()
                theirs.close()  # Else the end of the process would not end the pipe.
                self._pipes.append(ours)
                self._processes.append(process)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # That is the end of the turns.
        for process in self._processes:
            process.join(0 if error[0] else 20)
            process.kill()
            process.join()

    def answers(self) -> list[dict[str, Any]]:
        """Return the next answer of each process. Raises RuntimeError as soon as one fails."""
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < len(self._pipes):
            ready = wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in answers])
            for rank in [rank for rank, pipe in enumerate(self._pipes) if pipe in ready]:
                try:
                    answers[rank] = self._pipes[rank].recv()
                except EOFError:
                    self._processes[rank].join()
                    code = self._processes[rank].exitcode
                    raise RuntimeError(f"process {rank} ended with code {code}; see its output") from None
                if "failed" in answers[rank]:
                    raise RuntimeError(answers[rank]["failed"])
        return [answers[rank] for rank in range(len(self._pipes))]

    def turn(self, measured: Measured, steps: int, *, timed: bool) -> None:
        """Train so many steps and add their figures."""
        peaks, done = [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.005):
                with contextlib.suppress(OSError, RuntimeError):  # Linux alone reports it.
                    peaks[0] = max(peaks[0], *(anonymous_bytes(process.pid or 0) for process in self._processes))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            for pipe in self._pipes:
                with contextlib.suppress(BrokenPipeError):  # `answers` raises the reason.
                    pipe.send(steps)
            answers = self.answers()
        finally:
            done.set()
            thread.join()
        by_step = {name: list(zip(*(each[name] for each in answers), strict=True)) for name in ("seconds", "losses")}
        measured.losses += [statistics.fmean(losses) for losses in by_step["losses"]]
        if timed:
            measured.peak = max(measured.peak, *(each.get("peak", peaks[0]) for each in answers))
            measured.seconds.append([max(seconds) for seconds in by_step["seconds"]])
            measured.cpu_seconds += [sum(cpu) for cpu in zip(*(each["cpu_seconds"] for each in answers), strict=True)]


def compare(group: Sequence[Measured], jobs: Mapping[str, Job], *, rounds: int, steps: int) -> None:
    """Measure the ways of a problem in `rounds` turns of `steps` steps each, after one warm-up step."""

    @contextlib.contextmanager
    def recording(measured: Measured) -> Iterator[None]:
        """Record and print the failure of a way; the others go on."""
        try:
            yield
        except RuntimeError as error:
            measured.failed = str(error)
            say(f"  {WAYS[measured.way].title}: {error}")

    with contextlib.ExitStack() as alive:
        running: list[tuple[Measured, Processes]] = []
        for measured in group:
            with recording(measured):
                environment = environment_of(measured.way, measured.processes)
                processes = alive.enter_context(Processes(jobs[measured.way], measured.processes, environment))
                measured.imported = min(answer["imported"] for answer in processes.answers())
                measured.ran = processes.answers()[0]["ran"]
                processes.turn(measured, 1, timed=False)
                running.append((measured, processes))
                say(f"  {WAYS[measured.way].title}: ready ({measured.ran}), loss {measured.losses[0]:.4f}")
        for turn in range(1, rounds + 1):
            for measured, processes in running:
                if not measured.failed:
                    with recording(measured):
                        processes.turn(measured, steps, timed=True)
            rates = [f"{each.way} {each.rates[-1]:.0f}" for each, _ in running if each.is_whole]
            say(f"  round {turn} of {rounds}: {', '.join(rates)} tokens/s")


def environment_of(way: str, processes: int) -> dict[str, str]:
    """Return the variables of a way's processes: for ours those that the launcher sets for workers."""
    found = worker_environment(processes)
    if not way.startswith(OURS):
        found = {name: text for name, text in found.items() if name in os.environ or name not in ON_CPU}
    return {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"} | found


def write_inputs(folder: Path, size: Size, model: str | None) -> tuple[str, str]:
    """Write a random model, or one of a GGUF file in bf16, and an adapter; return the folders of model and adapter."""
    place, adapter = folder / "model", folder / "adapter"
    if model is None:
        say("writing a random model")
        write_random_checkpoint(place, size.settings, num_shards=1)
    else:
        local = localize(ModelConfig(path=model))
        if local.gguf_file is None:
            place = Path(local.path)
        else:
            base = Trained(place=local.path, spec=base_spec(local.path, "none"), weights=None)
            merge_to(base, place, onto="trained", dtype=torch.bfloat16, say=ignore)
    sections: dict[str, Any] = {"model": {"path": str(place)}, "data": {"path": "none"}, "run_dir": "none"}
    sections |= {"adapter": {"r": 16, "target_modules": "all-linear"}, "quant": {"method": "none"}}
    config = build(Config, sections)
    new, backend, _ = start_run_model(config, Ranks(0, 1, torch.device("cpu"), None))
    adapter.mkdir()
    write_files(adapter, weight_files(new, config.spec), backend)  # A random, B zero.
    return str(place), str(adapter)


def table_of(group: Sequence[Measured]) -> Table:
    """Return the table of one problem."""
    references = [each for each in group if each.is_whole and each.way in REFERENCES]
    head = ["", "tokens/s", "best", "CPU s per step", "memory, MiB", "with imports", "losses"]
    for reference in references:
        head += [f"{reference.way}: times as fast", "memory"]
    rows = [[*head, "what ran"]]
    for each in group:
        title = WAYS[each.way].title
        if not each.seconds:
            rows.append([title, *[""] * (len(head) - 1), f"failed: {each.failed}"])
            continue
        cells = [title, f"{statistics.median(each.rates):,.0f}", f"{max(each.rates):,.0f}"]
        cells += [f"{statistics.median(each.cpu_seconds):.2f}", f"{each.over_imports / MIB:,.0f}"]
        cells += [f"{each.peak / MIB:,.0f}", f"{each.losses[0]:.4f} -> {each.losses[-1]:.4f}"]
        for reference in references:
            cells += [spread(reference.ratios(each)), f"{reference.over_imports / each.over_imports:.2f}"]
        rows.append([*cells, f"{each.ran}; failed: {each.failed}" if each.failed else each.ran])
    return Table(group[0].problem, rows[0], rows[1:])


def sentences(groups: Sequence[Sequence[Measured]]) -> Iterator[str]:
    """Yield a sentence for each pair of ours and a peer over all problems, and a warning if first losses differ."""
    for our_way, way in itertools.product(REFERENCES, WAYS):
        found = [{each.way: each for each in group if each.is_whole} for group in groups]
        pairs = [(each[our_way], each[way]) for each in found if our_way in each and way in each]
        if pairs and not way.startswith(OURS):
            speeds = [statistics.median(own.ratios(peer)) for own, peer in pairs]
            memory = [own.over_imports / peer.over_imports for own, peer in pairs]
            yield (
                f"{WAYS[our_way].title} beside {WAYS[way].title}: {min(speeds):.2f} to {max(speeds):.2f} times as "
                f"fast, with {min(memory):.2f} to {max(memory):.2f} of the memory ({len(pairs)} problems)."
            )
    for group in groups:
        # A bf16 base of real weights has other losses than their 4-bit copies.
        first = {each.way: each.losses[0] for each in group if each.losses and each.way != "ours-bf16"}
        # bf16 models that start equal differ by less than 0.02 nats.
        if first and max(first.values()) - min(first.values()) > 0.02:
            yield f"WARNING: the first losses of {group[0].problem} differ: {first}."


def parsed() -> argparse.Namespace:
    """Return the options. Ends the process with an error for what cannot be measured."""
    parser, gpus = parser_of(__doc__), gpu_count()
    sizes = ("8B/4", "70B/4") if gpus else ("100M", DEMO)
    ways = tuple(name for name, way in WAYS.items() if way.by_default)
    parser.add_argument("--sizes", type=names_of(SIZES), help=f"of {', '.join(SIZES)} ({','.join(sizes)})")
    parser.add_argument("--model", type=Path, help="a model in Hugging Face format, instead of the default sizes")
    parser.add_argument(
        "--ranks", type=numbers, help="numbers of processes: one per GPU, or they share the cores (1,2)"
    )
    parser.add_argument("--checkpointing", type=names_of(("none", "block")), help="of none, block (by size)")
    parser.add_argument("--rounds", type=number, default=3, help="turns of each library (%(default)s)")
    parser.add_argument("--steps", type=number, default=1, help="steps per turn (%(default)s)")
    parser.add_argument("--tokens", type=number, help="tokens per sequence (by size)")
    parser.add_argument("--rows", type=number, help="sequences per step, over all processes (by size)")
    named = f"of {', '.join(WAYS)} (all but {', '.join(sorted(set(WAYS) - set(ways)))})"
    parser.add_argument("--ways", type=names_of(WAYS), default=ways, help=named)
    options = parser.parse_args()
    names = options.sizes or (() if options.model else sizes)
    options.problems = {name: (SIZES[name], None) for name in names}
    options.ranks = options.ranks or ((1,) if gpus == 1 else (1, 2))
    try:
        if DEMO in names:
            options.problems[DEMO] = SIZES[DEMO], str(smollm2(say))
        if options.model is not None:
            folder = options.model.expanduser().absolute()
            check_config(read_config(folder), folder / "config.json", sequence_length=options.tokens or 512)
            options.problems |= {folder.name: (Size(), str(folder))}
    except UserError as error:
        parser.error(str(error))
    for (size, _), ranks in itertools.product(options.problems.values(), options.ranks):
        rows = options.rows or size.rows
        if rows % ranks or 0 < gpus < ranks:
            parser.error(f"--ranks={ranks} does not divide {rows} sequences per step, or exceeds the GPUs of this node")
    return options


def groups_of(options: argparse.Namespace, ways: Sequence[str], scratch: Path) -> Iterator[list[Measured]]:
    """Measure and yield every problem: model, length, activation checkpointing and number of processes."""
    for name, (size, model) in options.problems.items():
        model, adapter = write_inputs(scratch / name.replace("/", "_"), size, model)
        lengths = (options.tokens,) if options.tokens else size.lengths
        rows, modes = options.rows or size.rows, options.checkpointing or size.checkpointing
        for length, mode, world in itertools.product(lengths, modes, options.ranks):
            processes = "1 process" if world == 1 else f"{world} processes"
            problem = f"{name}, {rows} x {length} tokens, {processes}, checkpointing {mode}"
            steps = (1 + options.rounds * options.steps) + (1 + options.rounds)  # A GPU repeats a step per turn.
            inputs = {"model": model, "adapter": adapter, "length": length, "rows": rows, "steps": steps}
            chosen = [way for way in ways if min(world, 2) in WAYS[way].processes]
            jobs = {way: Job(**inputs, checkpointing=mode, **WAYS[way].job) for way in chosen}
            group = [Measured(problem, way, rows * length, world) for way in chosen]
            if group:
                say(problem)
                compare(group, jobs, rounds=options.rounds, steps=options.steps)
                yield group


def main() -> int:
    """Measure and print. Returns the exit code: 1 if one of ours failed."""
    options = parsed()
    reasons = {way: reason_against(way, "cuda" if gpu_count() else "cpu") for way in options.ways}
    for way, reason in reasons.items():
        if reason is not None:
            say(f"left out: {WAYS[way].title}: {reason}")
    ways = [way for way, reason in reasons.items() if reason is None]
    with tempfile.TemporaryDirectory() as temporary, libraries_print_to_stderr():
        groups = list(groups_of(options, ways, Path(temporary)))
    everything = [each for group in groups for each in group]
    left_out = [f"{way}: {reason}" for way, reason in reasons.items() if reason is not None]
    method = (
        f"{options.rounds} rounds of {options.steps} steps; memory is the peak anonymous memory of a process in its "
        "steps over that after its imports (on a GPU the peak that torch allocated); processes divide the threads"
    )
    threads = int(worker_environment(1)["OMP_NUM_THREADS"])
    libraries = ("transformers", "peft", "bitsandbytes", "accelerate")
    notes = ". ".join([measurement_notes(*libraries, threads=threads), method, *left_out])
    tables = [table_of(group) for group in groups]
    heading = "A training step beside other libraries"
    show(heading, tables, notes, sentences=list(sentences(groups)))
    return int(any(each.failed for each in everything if each.way.startswith(OURS)) or not everything)


if __name__ == "__main__":
    sys.exit(main())
