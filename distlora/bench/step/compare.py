"""Run the cells of `distlora bench step` in turns.

The processes of a group stay alive together and train one after the other, again and again, so that a disturbance of
the machine affects all of them. Imports no torch.
"""

from __future__ import annotations

import contextlib
import itertools
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
from typing import IO, Any

from distlora.bench.host_counters import anonymous_bytes, free_port, loopback_bytes
from distlora.bench.requests import StepInputs, StepJob, to_argument
from distlora.bench.step.cells import JOBS, LEARNING_RATE, RANK, Cell
from distlora.system import host_memory

WORKER = "distlora.bench.step.worker"
PERIOD_SECONDS = 0.005
"""Seconds between two samples of the processes' memory."""
END_SECONDS = 20
"""Seconds that a process gets to end before it is killed."""


class CellFailedError(Exception):
    """A process of a cell failed; the message has the reason."""


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
    """Bytes of a process' collectives by kind, if they were counted."""
    device_left: int | None = None
    """Free bytes of its GPU afterwards; None on a CPU."""


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
                        [sys.executable, "-m", WORKER, to_argument(job)],
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
        deadline = time.monotonic() + (END_SECONDS if kind is None else 0)
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
            device_left=min((answer["device_left"] for answer in answers if held), default=None),
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


PREPARE = "distlora.bench.step.prepare"
PROGRESS_STEPS = 25
"""Steps between two progress lines of a loss curve."""
Environment = Callable[[Cell], Mapping[str, str]]
Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Files that all cells of a group start from (written by prepare.py)."""

    notes: str
    """Date, machine and versions of the measurement."""
    model: Path
    rows: Path
    adapters: Path
    """Folder of adapter_<seed>."""


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
    device_left: int | None = None
    """Free bytes of its GPU between two turns; None on a CPU."""
    moved: dict[str, int] | None = None
    loopback: int | None = None
    """Bytes received over the loopback interface per process in one step."""

    def add(self, turn: Turn) -> None:
        """Add the losses and the peak of a turn."""
        self.losses += turn.losses
        self.peak = max(self.peak, turn.peak)
        if turn.device_left is not None:
            self.imported, self.device_left = 0, turn.device_left

    @property
    def over_imports(self) -> int:
        """Peak bytes over the memory after imports."""
        return max(0, self.peak - self.imported)

    def seconds(self) -> list[float]:
        """Return the seconds of every measured step."""
        return [second for turn in self.turns for second in turn.seconds]


def job_of(cell: Cell, problem: Problem, *, lr: float = LEARNING_RATE) -> StepJob:
    """Return the job of a cell's processes."""
    return StepJob(
        model=str(problem.model),
        data=str(problem.rows),
        adapter=str(problem.adapters / f"adapter_{cell.seed}"),
        length=cell.length,
        rows=cell.rows,
        checkpointing=cell.checkpointing,
        lr=lr,
        **JOBS[cell.way],
    )


def prepare(
    folder: Path,
    *,
    environment: Mapping[str, str],
    model: Path,
    settings: Mapping[str, Any] | None = None,
    length: int,
    rows: int,
    steps: int,
    seeds: Sequence[int] = (0,),
    data: tuple[Path, Path] | None = None,
) -> Problem:
    """Write the sequences, an adapter for each seed, and the model if it is missing, into `folder`.

    Args:
        folder: Folder of the problem's files.
        environment: Environment of the process that writes them.
        model: Folder of the model.
        settings: config.json of a random model; None if `model` exists.
        length: Tokens per sequence.
        rows: Sequences per step.
        steps: Steps that the sequences last for.
        seeds: Seeds of the adapters.
        data: (file of documents, cache of tokenized data); None for random tokens.

    Raises:
        CellFailedError: The files could not be written.
    """
    request = StepInputs(
        folder=str(folder),
        model=str(model),
        settings=None if settings is None or model.exists() else json.dumps(settings),
        vocabulary=None if settings is None else settings["vocab_size"],
        length=length,
        rows=rows,
        steps=steps,
        seeds=tuple(seeds),
        r=RANK,
        data=None if data is None else str(data[0]),
        cache_dir=None if data is None else str(data[1]),
    )
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", PREPARE, to_argument(request)]
    finished = subprocess.run(command, env=dict(environment), capture_output=True, text=True)
    if finished.returncode != 0:
        raise CellFailedError(f"the model and its sequences could not be written:\n{finished.stderr}")
    notes: str = json.loads(finished.stdout)
    return Problem(notes=notes, model=model, rows=folder / f"rows_{length}.safetensors", adapters=folder)


def compare(
    cells: Sequence[Cell],
    problem_of: Callable[[Cell], Problem],
    *,
    rounds: int,
    steps: int,
    environment: Environment,
    log: Path,
    own_network: bool,
    log_line: Log,
) -> Iterator[list[Measured]]:
    """Measure the cells of each group in `rounds` turns of `steps` steps each.

    One warm-up step comes first, and with several processes one step whose bytes are counted. `own_network` states that
    no other process uses this loopback interface.
    """
    groups = [list(members) for _, members in itertools.groupby(cells, key=lambda cell: cell.group)]
    for number, group in enumerate(groups, 1):
        log_line(f"{group[0].problem} ({number} of {len(groups)})")
        yield _group(
            group,
            problem_of(group[0]),
            rounds=rounds,
            steps=steps,
            environment=environment,
            log=log,
            own_network=own_network,
            log_line=log_line,
        )


def _group(
    cells: Sequence[Cell],
    problem: Problem,
    *,
    rounds: int,
    steps: int,
    environment: Environment,
    log: Path,
    own_network: bool,
    log_line: Log,
) -> list[Measured]:
    group = [Measured(cell) for cell in cells]
    with contextlib.ExitStack() as alive:
        running: dict[int, Processes] = {}
        for number, measured in enumerate(group):
            cell = measured.cell
            with _recording_failure(measured, log_line):
                _require_room(group[:number], cell)
                processes = alive.enter_context(
                    Processes(job_of(cell, problem), count=cell.processes, environment=environment(cell), log=log)
                )
                measured.imported, measured.ran = processes.start()
                measured.add(processes.turn(1))
                if cell.processes > 1:
                    _count(processes, measured, own_network=own_network)
                running[number] = processes
                log_line(f"  {cell.title}: ready ({measured.ran}), loss {measured.losses[0]:.4f}")
        for turn in range(rounds):
            for number, processes in list(running.items()):
                measured = group[number]
                with _recording_failure(measured, log_line):
                    measured.turns.append(processes.turn(steps))
                    measured.add(measured.turns[-1])
                if measured.failed is not None:
                    del running[number]
            if running:
                log_line(f"  round {turn + 1} of {rounds}: {_tokens_per_second([group[number] for number in running])}")
    return group


def _require_room(before: Sequence[Measured], cell: Cell) -> None:
    """Raise CellFailedError if the host memory, or the GPU, cannot hold another cell beside the waiting ones."""
    most = max((each.peak for each in before), default=0)
    on_device = [each.device_left for each in before if each.device_left is not None]
    left, needed = (on_device[-1], most) if on_device else (host_memory.available_bytes(), cell.processes * most)
    if left is not None and left < needed:
        raise CellFailedError(
            f"this {'GPU' if on_device else 'machine'} has {left / 1e9:.1f} GB left, and a process of the cells "
            f"before it took {most / 1e9:.1f} GB (--ways compares fewer at once)"
        )


def _count(processes: Processes, measured: Measured, *, own_network: bool) -> None:
    """Train one step and count its bytes."""
    before = loopback_bytes()
    turn = processes.turn(1, counts=True)
    received = loopback_bytes() - before
    measured.add(turn)
    measured.moved = turn.moved
    measured.loopback = received // measured.cell.processes if own_network else None


@contextlib.contextmanager
def _recording_failure(measured: Measured, log_line: Log) -> Iterator[None]:
    """Record and log the failure of a cell; the others go on."""
    try:
        yield
    except CellFailedError as error:
        measured.failed = str(error)
        log_line(f"  {measured.cell.title}: {error}")


def _tokens_per_second(cells: Sequence[Measured]) -> str:
    """Return the tokens/s of the newest turns."""
    rates = (f"{m.cell.way} {m.cell.tokens * len(s) / sum(s):.0f}" for m in cells if (s := m.turns[-1].seconds))
    return ", ".join(rates) + " tokens/s"


def train_alone(
    cells: Sequence[Cell],
    problem: Problem,
    *,
    steps: int,
    environment: Environment,
    log: Path,
    lr: float,
    log_line: Log,
) -> list[Measured]:
    """Train each cell alone, over the same steps, for loss curves."""
    curves = []
    for cell in cells:
        measured = Measured(cell)
        curves.append(measured)
        with _recording_failure(measured, log_line):
            job = job_of(cell, problem, lr=lr)
            with Processes(job, count=cell.processes, environment=environment(cell), log=log) as processes:
                measured.imported, measured.ran = processes.start()
                while (left := steps - len(measured.losses)) > 0:
                    measured.turns.append(processes.turn(min(PROGRESS_STEPS, left)))
                    measured.add(measured.turns[-1])
                    done, loss = len(measured.losses), measured.losses[-1]
                    log_line(f"  {cell.title}, seed {cell.seed}: step {done} of {steps}, loss {loss:.4f}")
    return curves
