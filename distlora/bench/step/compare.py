"""Define the models, ways and cells of `distlora bench step`, and run the cells in turns.

The processes of a group stay alive together and train one after the other, again and again, so that a disturbance of
the machine affects all of them. Imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from distlora.architecture.shapes import ARCHITECTURES
from distlora.bench.host import anonymous_bytes, free_port
from distlora.system.command_worker import encode_call
from distlora_kernels import native

Checkpointing = Literal["none", "block"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "block")
RANK, LEARNING_RATE = 16, 2e-4
"""Rank and learning rate of the adapters, which are on every linear."""
DEMO = "SmolLM2"
"""Size and folder that stand for the model of `distlora demo`."""
OURS = "ours"
"""The way that the others are compared with."""
UNCOMPILED = "ours-uncompiled"
"""Ours without train.compile=auto."""
COMPILED_PEERS = ("peft-bf16-compiled", "peft-fp32-compiled")
"""Peers under torch.compile."""
KEPT_PAGES = "peft-bf16-kept-pages"
"""A peer with the environment variables of our workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model and the step that is measured."""

    settings: dict[str, Any] = field(default_factory=dict)
    """config.json of a random Llama."""
    model: str | None = None
    """Folder of a real model, or DEMO; None for the random one."""
    rows: int
    """Sequences per step, over all processes."""
    lengths: tuple[int, ...]
    """Tokens per sequence, each measured."""
    checkpointing: tuple[Checkpointing, ...] = ("block",)


def _small(hidden: int, inner: int, layers: int) -> dict[str, Any]:
    heads = hidden // 64
    return {
        "vocab_size": 4096,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    }


def _slice(name: str) -> dict[str, Any]:
    settings = {key: value for key, value in ARCHITECTURES[name].items() if key != "model_type"}
    return settings | {"num_hidden_layers": 4}


SIZES: dict[str, dict[str, Size]] = {
    "cpu": {
        "8M": Size(settings=_small(256, 704, 8), rows=4, lengths=(512,), checkpointing=CHECKPOINTING),
        "100M": Size(settings=_small(1024, 2816, 8), rows=4, lengths=(512,), checkpointing=CHECKPOINTING),
        "560M": Size(settings=_small(2048, 5632, 12), rows=2, lengths=(512,)),
        DEMO: Size(model=DEMO, rows=4, lengths=(512,), checkpointing=CHECKPOINTING),
    },
    "cuda": {
        "8B/4": Size(settings=_slice("meta-llama/Llama-3.1-8B"), rows=2, lengths=(2048, 8192)),
        "70B/4": Size(settings=_slice("meta-llama/Llama-3.1-70B"), rows=2, lengths=(2048, 8192)),
    },
}
"""Sizes by device type. On a GPU: four decoder layers of the named models."""
DEFAULT_SIZES = {"cpu": ("100M", DEMO), "cuda": ("8B/4", "70B/4")}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to train."""

    title: str
    job: dict[str, Any]
    """Fields of its StepJob."""
    needs: tuple[str, ...] = ()
    """Packages that are no dependencies of ours."""
    processes: tuple[int, ...] = (1, 2)
    """Process counts by default; 2 stands for any number above 1."""
    by_default: bool = True

    def runs_on(self, processes: int) -> bool:
        """Return True if the way trains on so many processes."""
        return min(processes, 2) in self.processes


PEFT = ("peft", "bitsandbytes")
ACCELERATE = (*PEFT, "accelerate")
RECIPE = "PEFT + bitsandbytes, documented recipe"
"""fp32 norms, embeddings and LM head (prepare_model_for_kbit_training), fp32 adapters, bf16 autocast."""
IN_BF16 = "PEFT + bitsandbytes, all in bf16"
"""bf16 adapters, no autocast."""
IN_FP32 = "PEFT + bitsandbytes, all in fp32"
"""The fastest eager way on CPUs without fast instructions for bf16."""
WAYS: dict[str, Way] = {
    OURS: Way("distlora, NF4", {"runs": "ours"}),
    UNCOMPILED: Way("distlora, NF4, train.compile=false", {"runs": "ours", "compile": False}),
    "ours-bf16": Way("distlora, bf16 base", {"runs": "ours", "base": "none"}, processes=(1,)),
    "peft-documented": Way(RECIPE, {"runs": "loop", "recipe": "documented"}, PEFT),
    "peft-bf16": Way(IN_BF16, {"runs": "loop", "recipe": "bf16"}, PEFT),
    KEPT_PAGES: Way(f"{IN_BF16}, the environment of ours", {"runs": "loop", "recipe": "bf16"}, PEFT, by_default=False),
    "peft-bf16-compiled": Way(f"{IN_BF16}, torch.compile", {"runs": "loop", "recipe": "compiled"}, PEFT),
    "peft-fp32": Way(IN_FP32, {"runs": "loop", "recipe": "bf16", "dtype": "fp32"}, PEFT),
    "peft-fp32-compiled": Way(
        f"{IN_FP32}, torch.compile", {"runs": "loop", "recipe": "compiled", "dtype": "fp32"}, PEFT, by_default=False
    ),
    "trainer": Way(f"Trainer + {RECIPE}", {"runs": "trainer"}, ACCELERATE, processes=(1,)),
    "fsdp2": Way(f"accelerate FSDP2 + {RECIPE}", {"runs": "fsdp2", "recipe": "plain"}, ACCELERATE, processes=(2,)),
    "fsdp2-forced": Way(
        "accelerate FSDP2, its check of the device bypassed",
        {"runs": "fsdp2", "recipe": "forced"},
        ACCELERATE,
        processes=(2,),
        by_default=False,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way to train one model on a number of processes."""

    size: str
    length: int
    rows: int
    """Sequences per step, over all processes."""
    processes: int
    checkpointing: Checkpointing
    way: str
    seed: int = 0
    """Seed of the initial adapter."""

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.rows * self.length

    @property
    def title(self) -> str:
        """Title of the way."""
        return WAYS[self.way].title

    @property
    def group(self) -> Cell:
        """The properties that cells compared with each other share."""
        return dataclasses.replace(self, way=OURS, seed=0)

    @property
    def problem(self) -> str:
        """Name of the group: the model and the step."""
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{self.size}, {self.rows} x {self.length} tokens, {processes}, checkpointing {self.checkpointing}"


def reason_against(way: str, device: str) -> str | None:
    """Return why a way cannot be measured on this "cpu" or "cuda" device; None if it can."""
    missing = [package for package in WAYS[way].needs if not installed(package)]
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    if way == UNCOMPILED and device == "cuda":
        return "train.compile=auto is false on a GPU"
    return native.unavailable_reason() if device == "cpu" and way in COMPILED_PEERS else None


def installed(package: str) -> bool:
    """Return True if a package is installed."""
    return any(importlib.metadata.distributions(name=package))


def cells_of(
    sizes: dict[str, Size],
    ways: Sequence[str],
    *,
    processes: Sequence[int],
    checkpointing: Sequence[Checkpointing] | None,
) -> Iterator[Cell]:
    """Yield every cell, group by group; `checkpointing` is None for each size's own modes."""
    for name, size in sizes.items():
        for length in size.lengths:
            for mode in checkpointing or size.checkpointing:
                for world in processes:
                    for way in ways:
                        if WAYS[way].runs_on(world):
                            yield Cell(
                                size=name,
                                length=length,
                                rows=size.rows,
                                processes=world,
                                checkpointing=mode,
                                way=way,
                            )


COMMAND = "distlora.system.command_worker"
WORKER, PREPARE = "distlora.bench.step.worker:main", "distlora.bench.step.worker:make_inputs"
PERIOD_SECONDS = 0.005
"""Seconds between two samples of the processes' memory."""


class CellFailedError(Exception):
    """A process of a cell failed; the message has the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """The files that all cells of one problem start from, and how to make them."""

    folder: str
    """Folder of the sequences, rows_<length>.safetensors, and of the adapters, adapter_<seed>."""
    model: str
    """Folder of the model."""
    settings: str | None = None
    """config.json of a random model, as JSON, which is written if it is missing; None for a real one's folder."""
    gguf: str | None = None
    """Folder that describes a GGUF file, which is written to `model` in bf16 if that is missing: peers train on no
    such file."""
    length: int
    """Tokens per sequence."""
    rows: int
    """Sequences per step, over all processes."""
    steps: int
    """Steps that the sequences last for."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial adapters."""
    data: str | None = None
    """File of documents; None for random tokens."""
    cache_dir: str | None = None
    """Cache of tokenized data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepJob:
    """The work of one process of a cell."""

    model: str
    data: str
    """File of the packed sequences."""
    adapter: str
    """Folder of the initial adapter, in PEFT's format."""
    length: int
    rows: int
    checkpointing: Literal["none", "block"]
    lr: float
    runs: Literal["ours", "loop", "trainer", "fsdp2"]
    """The training loop that runs."""
    base: Literal["nf4", "none"] = "nf4"
    """quant.method of ours."""
    compile: bool | Literal["auto"] = "auto"
    """train.compile of ours."""
    recipe: Literal["documented", "bf16", "compiled", "plain", "forced"] = "documented"
    """Variant of a peer's loop."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of a peer's model and adapters in recipes without autocast."""


def job_of(cell: Cell, inputs: StepInputs, *, lr: float = LEARNING_RATE) -> StepJob:
    """Return the job of a cell's processes."""
    return StepJob(
        model=inputs.model,
        data=f"{inputs.folder}/rows_{inputs.length}.safetensors",
        adapter=f"{inputs.folder}/adapter_{cell.seed}",
        length=cell.length,
        rows=cell.rows,
        checkpointing=cell.checkpointing,
        lr=lr,
        **WAYS[cell.way].job,
    )


def prepare(inputs: StepInputs, environment: Mapping[str, str]) -> str:
    """Write the files of a problem that are missing. Returns the date, machine and versions of the measurement.

    Raises CellFailedError if they could not be written.
    """
    command = [sys.executable, "-m", COMMAND, encode_call(PREPARE, inputs)]
    finished = subprocess.run(command, env=dict(environment), capture_output=True, text=True)
    if finished.returncode != 0:
        raise CellFailedError(f"the model and its sequences could not be written:\n{finished.stderr}")
    return finished.stdout.strip()


@dataclass(frozen=True, slots=True)
class Turn:
    """Figures of some steps: of the slowest process, and of the one with the highest peak."""

    seconds: list[float]
    """Seconds of each step."""
    cpu_seconds: list[float]
    """CPU seconds of each step, over all processes."""
    losses: list[float]
    """Loss of each step, the mean over the processes."""
    peak: int
    """Peak anonymous memory of a process; on a GPU the peak that torch allocated."""
    moved: dict[str, int] | None
    """Bytes of a process' collectives by type, if they were counted."""


class Processes:
    """The processes of a running cell, as a context manager; they wait for their turns."""

    def __init__(self, job: StepJob, *, count: int, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        distributed = (
            {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)} if count > 1 else {}
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        with log.open("ab") as log_file:
            for rank in range(count):
                rank_variables = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", COMMAND, encode_call(WORKER, job)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log_file,
                        bufsize=0,  # A selector does not see bytes that were read ahead.
                        env={**environment, **distributed, **rank_variables},
                    )
                )

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):
                _pipe(process.stdin).close()
        deadline = time.monotonic() + (20 if kind is None else 0)  # Then they are killed.
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _pipe(process.stdout).close()

    def start(self) -> tuple[int, str]:
        """Wait for the model. Returns (anonymous bytes of a process after its imports, the model's class)."""
        imported = [answer["imported"] for answer in self._answers()]
        return min(imported), self._answers()[0]["ran"]

    def turn(self, steps: int, *, counts: bool = False) -> Turn:
        """Train so many steps; with `counts` count their collectives too."""
        with self._watched() as peaks:
            for process in self._processes:
                with contextlib.suppress(BrokenPipeError):  # `_answers` raises the reason.
                    _pipe(process.stdin).write(json.dumps({"steps": steps, "count": counts}).encode() + b"\n")
            answers = self._answers()
        held = [answer["device_peak"] for answer in answers if answer["device_peak"] is not None]
        return Turn(
            seconds=_each(max, answers, "seconds"),
            cpu_seconds=_each(sum, answers, "cpu_seconds"),
            losses=[total / len(answers) for total in _each(sum, answers, "losses")],
            peak=max(held or peaks.values(), default=0),
            moved=answers[0]["moved"],
        )

    def _answers(self) -> list[dict[str, Any]]:
        """Return the next answer of each process. Raises CellFailedError as soon as one fails."""
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes):
                selector.register(_pipe(process.stdout), selectors.EVENT_READ, rank)
            while len(answers) < len(self._processes):
                for key, _ in selector.select():
                    line = _pipe(self._processes[key.data].stdout).readline()
                    answer = json.loads(line) if line else {"failed": self._death(key.data)}
                    if "failed" in answer:
                        raise CellFailedError(answer["failed"])
                    answers[key.data] = answer
                    selector.unregister(key.fileobj)
        return [answers[rank] for rank in range(len(self._processes))]

    def _death(self, rank: int) -> str:
        code = self._processes[rank].wait()
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"process {rank} ended with code {code}: {last[0] if last else 'no output'}"

    @contextlib.contextmanager
    def _watched(self) -> Iterator[dict[int, int]]:
        """Sample the peak anonymous memory of each process, by process id; empty where Linux does not report it."""
        peaks: dict[int, int] = {}
        done = threading.Event()

        def watch() -> None:
            while True:
                for process in self._processes:
                    with contextlib.suppress(OSError, RuntimeError):
                        peaks[process.pid] = max(peaks.get(process.pid, 0), anonymous_bytes(process.pid))
                if done.wait(PERIOD_SECONDS):
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield peaks
        finally:
            done.set()
            thread.join()


def _each(combine: Any, answers: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Combine a figure of each step over the processes."""
    return [combine(values) for values in zip(*(answer[name] for answer in answers), strict=True)]


def _pipe(end: IO[bytes] | None) -> IO[bytes]:
    assert end is not None
    return end


@dataclass(slots=True)
class Measured:
    """Figures of one cell."""

    cell: Cell
    failed: str | None = None
    ran: str = ""
    imported: int = 0
    """Anonymous bytes of a process after its imports; 0 on a GPU."""
    turns: list[Turn] = field(default_factory=list)
    """Measured turns, one per round."""
    losses: list[float] = field(default_factory=list)
    """Loss of every step from the first on."""
    peak: int = 0
    """Peak bytes of all turns, warm-up included."""
    moved: dict[str, int] | None = None
    """Bytes of a process' collectives in one step, by type."""

    def add(self, turn: Turn) -> None:
        """Add the losses and the peak of a turn."""
        self.losses += turn.losses
        self.peak = max(self.peak, turn.peak)

    @property
    def over_imports(self) -> int:
        """Peak bytes over the memory after imports."""
        return max(0, self.peak - self.imported)

    def seconds(self) -> list[float]:
        """Return the seconds of every measured step."""
        return [second for turn in self.turns for second in turn.seconds]


@dataclass(frozen=True, kw_only=True, slots=True)
class Runner:
    """Runs the processes of cells."""

    environment: Callable[[Cell], Mapping[str, str]]
    log: Path
    """File for what the processes print."""
    log_line: Callable[[str], None]
    """Prints a progress line."""

    def compare(self, cells: Sequence[Cell], inputs: StepInputs, *, rounds: int, steps: int) -> list[Measured]:
        """Measure the cells of a group in `rounds` turns of `steps` steps each.

        One warm-up step comes first, and with several processes one step whose bytes are counted.
        """
        group = [Measured(cell) for cell in cells]
        with contextlib.ExitStack() as alive:
            running: dict[int, Processes] = {}
            for number, measured in enumerate(group):
                cell = measured.cell
                with self._recording_failure(measured):
                    processes = alive.enter_context(self._processes(job_of(cell, inputs), cell))
                    measured.imported, measured.ran = processes.start()
                    measured.add(processes.turn(1))
                    if cell.processes > 1:
                        turn = processes.turn(1, counts=True)
                        measured.add(turn)
                        measured.moved = turn.moved
                    running[number] = processes
                    self.log_line(f"  {cell.title}: ready ({measured.ran}), loss {measured.losses[0]:.4f}")
            for number_of_turn in range(1, rounds + 1):
                rates = []
                for number, processes in list(running.items()):
                    measured = group[number]
                    with self._recording_failure(measured):
                        measured.turns.append(processes.turn(steps))
                        measured.add(measured.turns[-1])
                        seconds = measured.turns[-1].seconds
                        rates.append(f"{measured.cell.way} {measured.cell.tokens * len(seconds) / sum(seconds):.0f}")
                    if measured.failed is not None:
                        del running[number]
                if rates:
                    self.log_line(f"  round {number_of_turn} of {rounds}: {', '.join(rates)} tokens/s")
        return group

    def train_alone(self, cells: Sequence[Cell], inputs: StepInputs, *, steps: int, lr: float) -> list[Measured]:
        """Train each cell alone, over the same steps, for loss curves."""
        curves = [Measured(cell) for cell in cells]
        for measured in curves:
            cell = measured.cell
            with self._recording_failure(measured), self._processes(job_of(cell, inputs, lr=lr), cell) as processes:
                measured.imported, measured.ran = processes.start()
                while (left := steps - len(measured.losses)) > 0:
                    measured.turns.append(processes.turn(min(25, left)))
                    measured.add(measured.turns[-1])
                    done, loss = len(measured.losses), measured.losses[-1]
                    self.log_line(f"  {cell.title}, seed {cell.seed}: step {done} of {steps}, loss {loss:.4f}")
        return curves

    def _processes(self, job: StepJob, cell: Cell) -> Processes:
        return Processes(job, count=cell.processes, environment=self.environment(cell), log=self.log)

    @contextlib.contextmanager
    def _recording_failure(self, measured: Measured) -> Iterator[None]:
        """Record and log the failure of a cell; the others go on."""
        try:
            yield
        except CellFailedError as error:
            measured.failed = str(error)
            self.log_line(f"  {measured.cell.title}: {error}")
